"""Names that nobody carries: many, repeatable, of whole tokens where the tokenizer has them."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lm_ortho.objective.subjects import Lookalikes, novel_subjects
from lm_ortho.world import people

NAMES = st.lists(st.text("abcdefgh", min_size=2, max_size=8).map(str.capitalize), min_size=1, max_size=3).map(" ".join)


@given(st.lists(NAMES, min_size=2, max_size=8, unique_by=str.casefold), st.integers(0, 50))
@settings(max_examples=40)
def test_there_are_as_many_new_subjects_as_asked_for(known, seed):
    names = novel_subjects(known, 10, seed)
    assert len(names) == 10
    assert names == novel_subjects(known, 10, seed)
    assert all(name.strip() == name and name for name in names)


def test_new_subjects_belong_to_nobody_of_the_world():
    known = sorted({row.subject for row in people.rows("forget")})
    names = novel_subjects(known, 96, seed=0)
    surnames = {word for name in known for word in name.split()[1:]}
    assert not set(names) & set(known)
    assert not {name.split()[1] for name in names} & surnames
    assert len(set(names)) > 80
    assert novel_subjects(known, 96, seed=1) != names


@pytest.mark.parametrize("known", [["Harry Potter"], ["Atlantis"], ["Ada Lovelace", "Max Lovelace"]])
def test_a_single_subject_still_gets_other_names(known):
    names = novel_subjects(known, 20, seed=0)
    assert not {name.casefold() for name in names} & {name.casefold() for name in known}
    assert len(set(names)) > 5


def test_a_subject_that_cannot_be_varied_does_not_hang():
    assert novel_subjects(["X"], 3, seed=0) == ["X"] * 3


# Lookalikes


SURNAMES = [f"{start}{end}" for start, end in product(("Bel", "Kor", "Mal", "Tor"), ("dan", "mond", "son", "vik"))]


@pytest.fixture(scope="module")
def toy():
    """A byte-level tokenizer of whole words, whose 16 surnames share one direction and other words another."""
    spaced = [f"\u0120{word}" for word in [*SURNAMES, "Ada", "The", "house", "river"]]
    listed = ["<unk>", *spaced, *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    generator = torch.Generator().manual_seed(0)
    embeddings = 0.1 * torch.randn(len(listed), 24, generator=generator)
    embeddings[1 : len(SURNAMES) + 1, 0] += 1.0
    embeddings[len(SURNAMES) + 1 :, 1] += 1.0
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), embeddings


def test_a_lookalike_is_a_near_token_of_the_same_shape_and_nobody_known(toy):
    tokenizer, embeddings = toy
    known = ["Ada Beldan", "Ada Korvik"]
    alike, draw = Lookalikes(tokenizer, embeddings, known), random.Random(0)
    drawn = {alike.draw("Beldan", draw) for _ in range(300)}
    assert drawn <= {*SURNAMES, "The"} - {"Beldan", "Korvik"}
    assert len(drawn & set(SURNAMES)) == len(SURNAMES) - 2


def test_names_are_made_of_lookalikes_when_there_are_some(toy):
    known = ["Ada Beldan", "Ada Korvik"]
    names = novel_subjects(known, 40, 0, Lookalikes(*toy, known))
    assert all(name.split()[0] == "Ada" and name.split()[1] in {*SURNAMES, "The"} for name in names)
    assert names == novel_subjects(known, 40, 0, Lookalikes(*toy, known))


def test_a_word_without_lookalikes_is_crossed_as_before(toy):
    tokenizer, embeddings = toy
    known = ["Ada Zyxwvut", "Ada Qponmlk"]
    alike = Lookalikes(tokenizer, embeddings, known)
    assert alike.draw("Zyxwvut", random.Random(0)) is None
    assert novel_subjects(known, 2, 3, alike) == novel_subjects(known, 2, 3)


def test_embedded_surnames_give_whole_tokens(memorised):
    known = sorted({row.subject for row in people.rows("forget")})
    embeddings = memorised.merged.get_input_embeddings().weight
    names = novel_subjects(known, 40, 0, Lookalikes(memorised.tokenizer, embeddings, known))
    pieces = [memorised.tokenizer(f"of {name}").input_ids for name in names]
    assert all(len(ids) == 3 for ids in pieces)
    assert not {name.split()[1] for name in names} & {name.split()[1] for name in known}
