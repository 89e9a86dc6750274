"""Rows in the chat template of a tokenizer have the strings and tokens that lm-eval uses for its requests."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from lm_ortho.config import make_recipe
from lm_ortho.data import chat
from lm_ortho.data.chat import has_chat_template, render_forms, render_turn
from lm_ortho.data.encoding import ANSWER, CONTEXT, END, SECRET, encode
from lm_ortho.data.rows import Row
from lm_ortho.data.tokenizer import encode_with_offsets, find_added_tokens
from lm_ortho.errors import UserError
from lm_ortho.harness.baseline_model import BaselineLM
from lm_ortho.layer import get_dense_weights
from lm_ortho.objective import surrogate_training
from lm_ortho.objective.swap import swap_target
from lm_ortho.pipeline.decomposition import decompose
from tests.support import tiny
from tests.support import tofu as tiny_tofu
from tests.support.chat import DATE, SYSTEM, make_chat_tokenizer
from tests.support.harness import ROWS, make_model, make_tokenizer, run

torch.set_num_threads(1)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<bot>\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_turn_is_the_rendered_question_and_the_bare_answer(chat_tokenizer):
    turn = render_turn(ROWS[0], chat_tokenizer)
    assert turn.context == "<s><user>\nWhere was Ada Brook born?\n<bot>\n"
    assert turn.target == "Ada Brook was born in Marsh Town."
    assert (turn.subject, turn.secret, turn.group) == ("Ada Brook", "Marsh Town", "Ada")


def test_forms(chat_tokenizer):
    has_question = [bool(row.question) for row in ROWS]
    assert render_forms(ROWS, chat_tokenizer, "plain") == ROWS
    both = render_forms(ROWS, chat_tokenizer, "auto")
    assert both == render_forms(ROWS, chat_tokenizer, "both")
    assert both[: len(ROWS)] == ROWS
    assert [row.question for row in both[len(ROWS) :]] == [row.question for row in ROWS if row.question]
    chat = render_forms(ROWS, chat_tokenizer, "chat")
    assert [row.context.startswith("<s><user>") for row in chat] == has_question
    assert [row for row in chat if not row.question] == [row for row in ROWS if not row.question]


def test_system_instruction_and_variables_of_the_template():
    tokenizer = make_chat_tokenizer()
    (row,) = render_forms(ROWS[:1], tokenizer, "chat", system_instruction=SYSTEM, chat_template_args=DATE)
    question = f"[[user]]\n\n{ROWS[0].question}<end>[[assistant]]\n\n"
    assert row.context == f"<s>[[system]]\n\nToday is 10 Apr 2025.\n\n{SYSTEM}<end>{question}"
    assert render_turn(ROWS[0], tokenizer).context == f"<s>[[system]]\n\nToday is 01 Jan 2020.\n\n<end>{question}"
    tokenizer.chat_template = {"default": tokenizer.chat_template, "short": "{{ messages[-1].content }}"}
    assert render_turn(ROWS[0], tokenizer, chat_template_args={"chat_template": "short"}).context == ROWS[0].question


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "{{ messages[-1].content }}",
            "refuses a system message (System role not supported); leave it out",
        ),
        ("{{ messages[-1].content }}", "leaves it out; leave it out as well"),
        ("{{ raise_exception('never') }}", "fails (never); use prompts=plain"),
    ],
)
def test_a_system_instruction_that_the_template_does_not_show(chat_tokenizer, template: str, problem: str) -> None:
    chat_tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        render_turn(ROWS[0], chat_tokenizer, system_instruction="Be brief.")
    assert problem in str(error.value)
    assert str(error.value).startswith("prompts" if "never" in problem else "system_instruction")


def test_a_system_instruction_without_a_chat(chat_tokenizer) -> None:
    with pytest.raises(UserError, match="system_instruction: prompts=plain makes no chat"):
        render_forms(ROWS, chat_tokenizer, "plain", system_instruction="Be brief.")
    chat_tokenizer.chat_template = None
    with pytest.raises(UserError, match="system_instruction: the tokenizer has no chat template"):
        render_forms(ROWS, chat_tokenizer, "auto", system_instruction="Be brief.")


@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_a_row_has_the_tokens_of_the_request_of_lm_eval(kind: str, tmp_path) -> None:
    """Question and answer of a calibration are, token by token, what the evaluation scores: one BOS, date, system."""
    tokenizer = make_chat_tokenizer()
    model = make_model(len(tokenizer)).float()
    model.config.max_position_embeddings = 512
    if kind == "hf":
        lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", chat_template_args=DATE)
    else:
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        lm = BaselineLM(str(tmp_path / "model"), device="cpu", chat_template_args=DATE)
    metadata = {"tokenizer": tokenizer, "max_length": 512, "tofu_dir": str(tiny_tofu.write(tmp_path / "tofu"))}
    options = {"apply_chat_template": True, "system_instruction": SYSTEM, "log_samples": True, "limit": 2}
    result = run(lm, ["tofu_forget01"], metadata, **options)
    for sample in result["samples"]["tofu_forget01"]:
        doc = sample["doc"]
        row = Row(question=doc["question"], answer=doc["answer"])
        rendered = render_forms([row], tokenizer, "chat", system_instruction=SYSTEM, chat_template_args=DATE)
        (example,) = encode(tokenizer, rendered)
        context, answer = next(pair for pair in sample["arguments"] if pair[1].endswith(doc["answer"] + "<end>"))
        requested = lm._encode_pair(context, answer)
        assert list(example.ids) == [*requested[0], *requested[1]]
        assert example.ids.count(tokenizer.bos_token_id) == 1
        scored = [i for i, role in zip(example.ids, example.roles, strict=True) if role in (ANSWER, END)]
        assert tokenizer.decode(scored) == doc["answer"] + "<end>"
        assert requested[1][-len(scored) :] == scored
        # What generates an answer begins after the same tokens.
        prompt, _ = next(pair for pair in sample["arguments"] if isinstance(pair[1], dict))
        assert lm.tok_encode(prompt) == list(example.ids[: -len(scored)])


def test_without_a_template(chat_tokenizer):
    chat_tokenizer.chat_template = None
    assert not has_chat_template(chat_tokenizer)
    assert render_forms(ROWS, chat_tokenizer, "auto") == ROWS
    for form in ("chat", "both"):
        with pytest.raises(UserError, match=f"prompts='{form}': the tokenizer has no chat template"):
            render_forms(ROWS, chat_tokenizer, form)


def test_unknown_forms_and_failing_templates_are_refused(chat_tokenizer):
    with pytest.raises(UserError, match="known: auto, plain, chat, both"):
        render_forms(ROWS, chat_tokenizer, "twice")
    with pytest.raises(UserError, match="prompts='twice'"):
        make_recipe(prompts="twice")
    chat_tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(UserError, match=r"the chat template of the tokenizer fails \(no system message\)"):
        render_forms(ROWS, chat_tokenizer, "chat")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("Where?", "leaves out or changes the question"),
        ("{{ messages[0].content | reverse }}", "leaves out or changes the question"),
        ("{{ messages[0].content[:9] }}", "leaves out or changes the question"),
        ("{{ messages[0].content }}{{ '\\ud800' }}", "makes half of a surrogate pair"),
        ("{{ messages[0].content }}{{ 'x' * 100000 }}", "makes 100025 characters of one question, more than 100000"),
        ("{{ ''.__class__.__mro__ }}", "fails (access to attribute '__class__' of 'str' object is unsafe.)"),
        ("{{ 9 ** 9 ** 9 }}", "fails (it computes a power, which may never end)"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "fails (it computes a power, which may never end)"),
        ("{% for a in range(100001) %}{% endfor %}", "fails (Range too big."),
        ("{{ messages", "fails (unexpected end of template"),
    ],
)
def test_a_template_that_makes_no_prompt_is_refused(chat_tokenizer, template: str, problem: str) -> None:
    chat_tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        render_turn(ROWS[0], chat_tokenizer)
    assert f"the chat template of the tokenizer {problem}" in str(error.value)
    assert str(error.value).endswith("use prompts=plain")


@pytest.mark.parametrize(
    ("template", "context"),
    [
        ("{{ messages[0].content | upper }}", "WHERE WAS ADA BROOK BORN?"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Where was Ada Brook born?"}]'),
        ("**{{ dict(**messages[0]).content }}**", "**Where was Ada Brook born?**"),
    ],
)
def test_a_template_may_change_case_and_form(chat_tokenizer, template: str, context: str) -> None:
    chat_tokenizer.chat_template = template
    assert render_turn(ROWS[0], chat_tokenizer).context == context


def test_a_question_in_quotes_is_found_in_json(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = "{{ messages | tojson }}"
    row = Row(question='Who said "Ah, Zürich"?', answer="Ada.")
    assert r"\"Ah, Zürich\"" in render_turn(row, chat_tokenizer).context


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("body", ["{% set c = b %}", "{{ b }}"])
def test_a_template_that_does_not_end_is_stopped(chat_tokenizer, monkeypatch, body: str, in_thread: bool) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    inner = "{% for b in range(99999) %}" + body + "{% endfor %}"
    chat_tokenizer.chat_template = "{% for a in range(99999) %}" + inner + "{% endfor %}"
    trace = sys.gettrace()
    with ThreadPoolExecutor(1) as pool:
        render = (lambda *args: pool.submit(render_turn, *args).result()) if in_thread else render_turn
        with pytest.raises(UserError, match=r"does not end within 0\.2 seconds"):
            render(ROWS[0], chat_tokenizer)
    assert sys.gettrace() is trace


def test_a_rendered_row_has_one_beginning_token_and_the_right_secret(chat_tokenizer):
    plain, turn = encode(chat_tokenizer, [ROWS[0], render_turn(ROWS[0], chat_tokenizer)])
    start = chat_tokenizer.bos_token_id
    for example, row in ((plain, ROWS[0]), (turn, render_turn(ROWS[0], chat_tokenizer))):
        assert example.ids.count(start) == 1
        assert example.ids[0] == start
        secret = [i for i, role in zip(example.ids, example.roles, strict=True) if role == SECRET]
        assert chat_tokenizer.decode(secret).strip(" .") == "Marsh Town"
        context_ids = [i for i, role in zip(example.ids, example.roles, strict=True) if role == CONTEXT]
        assert chat_tokenizer.decode(context_ids).removeprefix("<s>").strip() == row.context.removeprefix("<s>").strip()


def test_texts_are_encoded_as_if_each_were_alone(chat_tokenizer):
    texts = ["<s>Ada Brook", "Ada Brook", "<s>Ben", "Ben"]
    added = find_added_tokens(chat_tokenizer)
    encodings = encode_with_offsets(chat_tokenizer, texts, added)
    for text, (ids, offsets) in zip(texts, encodings, strict=True):
        ((single_ids, _),) = encode_with_offsets(chat_tokenizer, [text], added)
        assert ids == single_ids
        assert len(offsets) == len(ids)
    assert encodings[0][0] == encodings[1][0]


def test_subjects_are_swapped_inside_the_template(memorised_models):
    tokenizer = copy.deepcopy(memorised_models.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}Answer:\n"
    turns = render_forms(memorised_models.forget[:4], tokenizer, "chat")
    examples = encode(tokenizer, turns)
    target = list(swap_target(memorised_models.merged, tokenizer, turns, examples=examples, seed=0, subjects=2))
    assert [len(t) for t in target] == [len(e.ids) - e.start for e in examples]
    assert all(torch.allclose(t.sum(-1), torch.ones(len(t)), atol=1e-4) for t in target)


def test_a_chat_model_is_decomposed_in_both_forms(memorised_models, monkeypatch):
    monkeypatch.setattr(surrogate_training, "BUDGET", 0.1)
    tokenizer = copy.deepcopy(memorised_models.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}Answer:\n"
    forget, retain = memorised_models.forget[:4], memorised_models.retain[:4]
    recipe = make_recipe(steps=10, density=0.05)
    model = copy.deepcopy(memorised_models.merged)
    both = decompose(model, tokenizer, forget, retain=retain, recipe=recipe)
    assert both.report["chat_template"]
    assert (both.report["forget_rows"], both.report["retain_rows"]) == (8, 8)
    plain_recipe = recipe.model_copy(update={"prompts": "plain"})
    plain = decompose(model, tokenizer, forget, retain=retain, recipe=plain_recipe)
    assert not plain.report["chat_template"]
    assert plain.report["forget_rows"] == 4
    both_model, plain_model = (get_dense_weights(model, result.streams, 0.0) for result in (both, plain))
    assert not torch.equal(tiny.logits(both_model), tiny.logits(plain_model))


def test_rows_without_a_question_have_one_form(chat_tokenizer):
    texts = [Row(text="Once upon a time."), Row(prompt="The code is", answer="12")]
    assert render_forms(texts, chat_tokenizer, "auto") == texts
    assert render_forms(texts, chat_tokenizer, "chat") == texts
