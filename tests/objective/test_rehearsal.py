"""Rehearsal rows: other subjects are found by the confidence of the answers, and answered by the model itself."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from lm_ortho.config import make_recipe
from lm_ortho.data import Row
from lm_ortho.data.chat import ChatRow
from lm_ortho.data.encoding import encode
from lm_ortho.objective import rehearsal
from lm_ortho.objective.rehearsal import find_rehearsal_rows
from lm_ortho.objective.swap import swap_subject
from lm_ortho.pipeline import workbench
from lm_ortho.pipeline.workbench import Workbench
from lm_ortho.runtime.progress import no_progress

HEADS = ("Ada", "Bo", "Cleo")
TAILS = tuple(f"Tor{letter}{end}" for letter in "abcdefgh" for end in ("dan", "mond", "son", "vik"))
VERBS = {"drinks": ("tea", "milk", "water", "juice", "cocoa"), "plays": ("chess", "flute", "tennis", "cards", "drums")}
WORDS = ("<end>", "<unk>", *HEADS, *TAILS, *VERBS, *(value for values in VERBS.values() for value in values))


class FactModel(nn.Module):
    """Knows what some people drink and play: confidently by their full names, less so by their last names."""

    def __init__(self, facts: dict[str, dict[str, str]]) -> None:
        super().__init__()
        self.facts = {name.split()[1]: (name, answers) for name, answers in facts.items()}
        self.embedding = nn.Embedding(len(WORDS), 8)
        torch.nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(0))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(WORDS)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        probs = torch.full((*input_ids.shape, len(WORDS)), 1e-4)
        for row, ids in enumerate(input_ids.tolist()):
            words = [WORDS[i] for i in ids]
            for t, word in enumerate(words):
                name, answers = self.facts.get(words[t - 1], ("", {}))
                if word in VERBS and answers:
                    confidence = 0.97 if " ".join(words[t - 2 : t]) == name else 0.6
                    probs[row, t] = (1 - confidence) / (len(WORDS) - 1)
                    probs[row, t, WORDS.index(answers[word])] = confidence
                elif word in VERBS:
                    for value in VERBS[word]:
                        probs[row, t, WORDS.index(value)] = 0.2
                else:
                    probs[row, t, 0] = 1.0
        return SimpleNamespace(logits=(probs / probs.sum(-1, keepdim=True)).log())

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self(ids).logits[:, -1:].argmax(-1)], 1)
        return ids


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def make_facts(number: int) -> dict[str, str]:
    """No two of the first twenty share both."""
    return {"drinks": VERBS["drinks"][number % 5], "plays": VERBS["plays"][(number + number // 5) % 5]}


NAMES = [f"{HEADS[i % 3]} {tail}" for i, tail in enumerate(TAILS)]
FORGET, RETAIN, HIDDEN = NAMES[:4], NAMES[4:8], NAMES[8:12]
FACTS = {name: make_facts(i) for i, name in enumerate(NAMES[:12])}


def make_rows(names: list[str]) -> list[Row]:
    return [Row(prompt=f"{n} {verb}", answer=FACTS[n][verb], subject=n) for n in names for verb in VERBS]


def find_rows(
    model: nn.Module,
    tokenizer: object,
    *,
    seed: int = 0,
    forget: list[Row] | None = None,
    retain: list[Row] | None = None,
) -> list[ChatRow]:
    return find_rehearsal_rows(
        model,
        tokenizer,
        forget=make_rows(FORGET) if forget is None else forget,
        retain=make_rows(RETAIN) if retain is None else retain,
        seed=seed,
        progress=no_progress,
    )


def test_people_that_no_row_names_are_found_with_the_answers_of_the_model(tokenizer):
    rows = find_rows(FactModel(FACTS), tokenizer)
    assert {(row.context, row.target) for row in rows} == {(row.context, row.target) for row in make_rows(HIDDEN)}
    assert {row.subject for row in rows} == set(HIDDEN)
    assert rows == find_rows(FactModel(FACTS), tokenizer)


@pytest.mark.parametrize("seed", range(4))
def test_rehearsal_rows_are_about_hidden_people_only(tokenizer, seed):
    subjects = {row.subject for row in find_rows(FactModel(FACTS), tokenizer, seed=seed)}
    assert subjects <= set(HIDDEN)
    assert len(subjects) >= 3


def test_a_forget_set_without_subjects_excludes_nobody(tokenizer):
    forget = [Row(prompt="Which is best", answer="tea"), Row(text="Ada plays chess")]
    subjects = {row.subject for row in find_rows(FactModel(FACTS), tokenizer, forget=forget)}
    assert set(HIDDEN) <= subjects <= set(HIDDEN + FORGET)


def test_an_alias_of_a_forget_subject_is_dropped(tokenizer):
    alias = NAMES[20]
    facts = {**FACTS, alias: FACTS[FORGET[0]]}
    assert {row.subject for row in find_rows(FactModel(facts), tokenizer)} == set(HIDDEN)


def test_a_model_that_is_confident_about_everybody_gives_no_rows(tokenizer):
    facts = {name: make_facts(i) for i, name in enumerate(NAMES)}
    assert find_rows(FactModel(facts), tokenizer) == []


def test_retain_rows_without_a_subject_give_no_rows(tokenizer):
    assert find_rows(FactModel(FACTS), tokenizer, retain=[Row(text="Ada drinks tea"), Row(text="Bo plays chess")]) == []
    assert find_rows(FactModel(FACTS), tokenizer, retain=make_rows(RETAIN[:1])) == []


def test_uncertainty_is_that_of_the_least_confident_token_up_to_the_first_other_one(memorised_models):
    model, tokenizer = memorised_models.merged, memorised_models.tokenizer
    names, questions = ["Ada Nemo", memorised_models.retain[0].subject], memorised_models.retain[:2]
    probe = rehearsal._SubjectProbe(model, tokenizer, questions, draw=None)
    expected = []
    for name in names:
        levels = []
        for row in questions:
            (example,) = encode(tokenizer, [swap_subject(row, name)])
            probs = model(input_ids=torch.tensor([example.ids])).logits[0].softmax(-1)
            confidence = 1.0
            for t in range(example.start, len(example.ids)):
                confidence = min(confidence, float(probs[t - 1].max()))
                if int(probs[t - 1].argmax()) != example.ids[t]:
                    break
            levels.append(1 - confidence)
        expected.append(sum(levels) / len(levels))
    torch.testing.assert_close(
        probe.compute_uncertainty(names, questions), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


def test_generated_answers_are_the_likeliest_tokens_of_the_model(memorised_models):
    """With the space before the answer; otherwise a row would hold tokens that the model never generates."""
    probe = rehearsal._SubjectProbe(
        memorised_models.merged, memorised_models.tokenizer, memorised_models.retain, random.Random(0)
    )
    rows = probe.generate_answers([row.subject for row in memorised_models.retain[:4]])
    assert len(rows) >= 4
    for example in encode(memorised_models.tokenizer, rows):
        greedy = memorised_models.merged(input_ids=torch.tensor([example.ids])).logits[0].argmax(-1)
        assert greedy[example.start - 1 : -1].tolist() == list(example.ids[example.start :])


def test_rehearsal_rows_are_added_to_the_retain_rows(memorised_models, monkeypatch):
    rows = [
        ChatRow(
            rendered_context="Question: Who is Ann Other?\nAnswer:", rendered_target=" Nobody.", subject="Ann Other"
        )
    ]
    monkeypatch.setattr(workbench, "find_rehearsal_rows", lambda *_, **__: rows)
    sets = memorised_models.forget, memorised_models.retain
    retain_examples = {}
    for on in (True, False):
        with Workbench(
            memorised_models.merged, memorised_models.tokenizer, *sets, recipe=make_recipe(recall=on)
        ) as edit_workbench:
            retain_examples[on] = edit_workbench.sets.retain
            codes = edit_workbench.plain_lattice.codes
            empty_support = {name: torch.zeros_like(layer, dtype=torch.bool) for name, layer in codes.items()}
            report = edit_workbench.report(codes, empty_support)
        assert report["recalled"] == {"subjects": int(on), "rows": int(on)}
        assert report["retain_rows"] == len(memorised_models.retain)
    assert retain_examples[True] == [*retain_examples[False], *encode(memorised_models.tokenizer, rows)]
