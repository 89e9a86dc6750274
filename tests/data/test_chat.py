"""Rows in the chat template of a tokenizer: the same strings and tokens that lm-eval asks with."""

from __future__ import annotations

import copy

import pytest
import torch

import lm_ortho.objective.surrogate as surrogate_module
from lm_ortho.config import make_recipe
from lm_ortho.data.chat import as_turn, has_chat_template, render_forms
from lm_ortho.data.encoding import CONTEXT, SECRET, encode, tokenise_with_offsets
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.layer import get_dense_weights
from lm_ortho.objective.swap import swap_target
from lm_ortho.pipeline.decomposition import decompose
from tests.support import tiny
from tests.support.harness import ROWS, make_tokenizer

torch.set_num_threads(1)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<bot>\n{% endif %}"
)


@pytest.fixture
def chatty():
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_turn_is_the_rendered_question_and_the_bare_answer(chatty):
    turn = as_turn(ROWS[0], chatty)
    assert turn.context == "<s><user>\nWhere was Ada Brook born?\n<bot>\n"
    assert turn.target == "Ada Brook was born in Marsh Town."
    assert (turn.subject, turn.secret, turn.group) == ("Ada Brook", "Marsh Town", "Ada")


def test_forms(chatty):
    asked = [bool(row.question) for row in ROWS]
    assert render_forms(ROWS, chatty, "plain") == ROWS
    both = render_forms(ROWS, chatty, "auto")
    assert both == render_forms(ROWS, chatty, "both")
    assert both[: len(ROWS)] == ROWS
    assert [row.question for row in both[len(ROWS) :]] == [row.question for row in ROWS if row.question]
    chat = render_forms(ROWS, chatty, "chat")
    assert [row.context.startswith("<s><user>") for row in chat] == asked
    assert [row for row in chat if not row.question] == [row for row in ROWS if not row.question]


def test_without_a_template(chatty):
    chatty.chat_template = None
    assert not has_chat_template(chatty)
    assert render_forms(ROWS, chatty, "auto") == ROWS
    for form in ("chat", "both"):
        with pytest.raises(UserError, match=f"prompts='{form}': the tokenizer has no chat template"):
            render_forms(ROWS, chatty, form)


def test_what_can_go_wrong(chatty):
    with pytest.raises(UserError, match="known: auto, plain, chat, both"):
        render_forms(ROWS, chatty, "twice")
    with pytest.raises(UserError, match="prompts='twice'"):
        make_recipe(prompts="twice")
    chatty.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(UserError, match=r"the chat template of the tokenizer fails \(no system message\)"):
        render_forms(ROWS, chatty, "chat")


def test_one_token_of_beginning_and_the_secret_where_it_is(chatty):
    plain, turn = encode(chatty, [ROWS[0], as_turn(ROWS[0], chatty)])
    start = chatty.bos_token_id
    for example, row in ((plain, ROWS[0]), (turn, as_turn(ROWS[0], chatty))):
        assert example.ids.count(start) == 1
        assert example.ids[0] == start
        secret = [i for i, role in zip(example.ids, example.roles, strict=True) if role == SECRET]
        assert chatty.decode(secret).strip(" .") == "Marsh Town"
        given = [i for i, role in zip(example.ids, example.roles, strict=True) if role == CONTEXT]
        assert chatty.decode(given).removeprefix("<s>").strip() == row.context.removeprefix("<s>").strip()


def test_tokens_are_those_of_each_text_alone(chatty):
    texts = ["<s>Ada Brook", "Ada Brook", "<s>Ben", "Ben"]
    together = tokenise_with_offsets(chatty, texts)
    for text, (ids, places) in zip(texts, together, strict=True):
        ((alone, _),) = tokenise_with_offsets(chatty, [text])
        assert ids == alone
        assert len(places) == len(ids)
    assert together[0][0] == together[1][0]


def test_subjects_are_swapped_inside_the_template(memorised):
    words = copy.deepcopy(memorised.tokenizer)
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}Answer:\n"
    turns = render_forms(memorised.forget[:4], words, "chat")
    examples = encode(words, turns)
    target = swap_target(memorised.merged, words, turns, examples, seed=0, subjects=2)
    assert [len(t) for t in target] == [len(e.ids) - e.start for e in examples]
    assert all(torch.allclose(t.sum(-1), torch.ones(len(t)), atol=1e-4) for t in target)


def test_a_chat_model_is_decomposed_in_both_forms(memorised, monkeypatch):
    monkeypatch.setattr(surrogate_module, "STEPS", 2)
    words = copy.deepcopy(memorised.tokenizer)
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}Answer:\n"
    sets = memorised.forget[:4], memorised.retain[:4]
    recipe = make_recipe(steps=10, density=0.05)
    model = copy.deepcopy(memorised.merged)
    both = decompose(model, words, *sets, recipe)
    assert both.report["chat_template"]
    assert (both.report["forget_rows"], both.report["retain_rows"]) == (8, 8)
    plain = decompose(model, words, *sets, recipe.model_copy(update={"prompts": "plain"}))
    assert not plain.report["chat_template"]
    assert plain.report["forget_rows"] == 4
    one, other = (get_dense_weights(model, made.streams, 0.0) for made in (both, plain))
    assert not torch.equal(tiny.logits(one), tiny.logits(other))


def test_rows_without_a_question_alone(chatty):
    texts = [Row(text="Once upon a time."), Row(prompt="The code is", answer="12")]
    assert render_forms(texts, chatty, "auto") == texts
    assert render_forms(texts, chatty, "chat") == texts
