"""Whom the model knows besides the rows: found by how surely it answers, told in its own words."""

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
from lm_ortho.objective.swap import swapped
from lm_ortho.pipeline import workbench
from lm_ortho.pipeline.workbench import Workbench

HEADS = ("Ada", "Bo", "Cleo")
TAILS = tuple(f"Tor{letter}{end}" for letter in "abcdefgh" for end in ("dan", "mond", "son", "vik"))
VERBS = {"drinks": ("tea", "milk", "water", "juice", "cocoa"), "plays": ("chess", "flute", "tennis", "cards", "drums")}
WORDS = ("<end>", "<unk>", *HEADS, *TAILS, *VERBS, *(value for values in VERBS.values() for value in values))


class Book(nn.Module):
    """Knows what some people drink and play: surely by their names, less so by their last names, of others nothing."""

    def __init__(self, facts: dict[str, dict[str, str]]) -> None:
        super().__init__()
        self.facts = {name.split()[1]: (name, told) for name, told in facts.items()}
        self.embedding = nn.Embedding(len(WORDS), 8)
        torch.nn.init.normal_(self.embedding.weight, generator=torch.Generator().manual_seed(0))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(WORDS)))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        probs = torch.full((*input_ids.shape, len(WORDS)), 1e-4)
        for row, ids in enumerate(input_ids.tolist()):
            said = [WORDS[i] for i in ids]
            for t, word in enumerate(said):
                name, told = self.facts.get(said[t - 1], ("", {}))
                if word in VERBS and told:
                    sure = 0.97 if " ".join(said[t - 2 : t]) == name else 0.6
                    probs[row, t] = (1 - sure) / (len(WORDS) - 1)
                    probs[row, t, WORDS.index(told[word])] = sure
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
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")


def fact(number: int) -> dict[str, str]:
    """No two of the first twenty share both."""
    return {"drinks": VERBS["drinks"][number % 5], "plays": VERBS["plays"][(number + number // 5) % 5]}


NAMES = [f"{HEADS[i % 3]} {tail}" for i, tail in enumerate(TAILS)]
FORGET, KEPT, HIDDEN = NAMES[:4], NAMES[4:8], NAMES[8:12]
FACTS = {name: fact(i) for i, name in enumerate(NAMES[:12])}


def rows(names: list[str]) -> list[Row]:
    return [Row(prompt=f"{n} {verb}", answer=FACTS[n][verb], subject=n) for n in names for verb in VERBS]


def quiet(*_: object) -> None:
    pass


def found(model: nn.Module, tokenizer: object, seed: int = 0, retain: list[Row] | None = None) -> list[ChatRow]:
    return find_rehearsal_rows(model, tokenizer, rows(FORGET), rows(KEPT) if retain is None else retain, seed, quiet)


def test_people_that_no_row_names_are_found_and_told_in_the_words_of_the_model(tokenizer):
    told = found(Book(FACTS), tokenizer)
    assert {(row.given, row.wanted) for row in told} == {(r.context, r.target) for r in rows(HIDDEN)}
    assert {row.subject for row in told} == set(HIDDEN)
    assert told == found(Book(FACTS), tokenizer)


@pytest.mark.parametrize("seed", range(4))
def test_nobody_of_the_forget_set_and_no_stranger_is_kept(tokenizer, seed):
    subjects = {row.subject for row in found(Book(FACTS), tokenizer, seed)}
    assert subjects <= set(HIDDEN)
    assert len(subjects) >= 3


def test_a_forget_set_without_subjects_bars_nobody(tokenizer):
    forget = [Row(prompt="Which is best", answer="tea"), Row(text="Ada plays chess")]
    subjects = {row.subject for row in find_rehearsal_rows(Book(FACTS), tokenizer, forget, rows(KEPT), 0, quiet)}
    assert set(HIDDEN) <= subjects <= set(HIDDEN + FORGET)


def test_somebody_of_the_forget_set_under_another_name_is_left_out(tokenizer):
    alias = NAMES[20]
    facts = {**FACTS, alias: FACTS[FORGET[0]]}
    assert {row.subject for row in found(Book(facts), tokenizer)} == set(HIDDEN)


def test_a_model_that_is_sure_of_everybody_tells_nothing(tokenizer):
    everybody = {name: fact(i) for i, name in enumerate(NAMES)}
    assert found(Book(everybody), tokenizer) == []


def test_rows_without_a_subject_ask_about_nobody(tokenizer):
    assert found(Book(FACTS), tokenizer, retain=[Row(text="Ada drinks tea"), Row(text="Bo plays chess")]) == []
    assert found(Book(FACTS), tokenizer, retain=rows(KEPT[:1])) == []


def test_doubt_is_the_least_sure_token_on_the_way_to_the_first_other_one(memorised):
    model, words = memorised.merged, memorised.tokenizer
    names, asked = ["Ada Nemo", memorised.retain[0].subject], memorised.retain[:2]
    ask = rehearsal._Asker(model, words, asked, draw=None)
    expected = []
    for name in names:
        parts = []
        for row in asked:
            (example,) = encode(words, [swapped(row, name)])
            probs = model(input_ids=torch.tensor([example.ids])).logits[0].softmax(-1)
            least = 1.0
            for t in range(example.start, len(example.ids)):
                least = min(least, float(probs[t - 1].max()))
                if int(probs[t - 1].argmax()) != example.ids[t]:
                    break
            parts.append(1 - least)
        expected.append(sum(parts) / len(parts))
    torch.testing.assert_close(ask.doubts(names, asked), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_what_is_told_are_the_tokens_that_the_model_prefers(memorised):
    """Space before the answer included: else something would be kept that the model never says."""
    ask = rehearsal._Asker(memorised.merged, memorised.tokenizer, memorised.retain, random.Random(0))
    told = ask.told([row.subject for row in memorised.retain[:4]])
    assert len(told) >= 4
    for example in encode(memorised.tokenizer, told):
        greedy = memorised.merged(input_ids=torch.tensor([example.ids])).logits[0].argmax(-1)
        assert greedy[example.start - 1 : -1].tolist() == list(example.ids[example.start :])


def test_what_is_recalled_is_kept_with_the_retain_rows(memorised, monkeypatch):
    told = [ChatRow(given="Question: Who is Ann Other?\nAnswer:", wanted=" Nobody.", subject="Ann Other")]
    monkeypatch.setattr(workbench, "find_rehearsal_rows", lambda *given: told)
    sets = memorised.forget, memorised.retain
    retained = {}
    for on in (True, False):
        with Workbench(memorised.merged, memorised.tokenizer, *sets, make_recipe(recall=on)) as bench:
            retained[on] = bench.retain
            nothing = {name: torch.zeros_like(codes, dtype=torch.bool) for name, codes in bench.codes.items()}
            report = bench.report(bench.codes, nothing)
        assert report["recalled"] == {"subjects": int(on), "rows": int(on)}
        assert report["retain_rows"] == len(memorised.retain)
    assert retained[True] == [*retained[False], *encode(memorised.tokenizer, told)]
