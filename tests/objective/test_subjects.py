"""Novel subjects: as many names as requested, reproducible, of whole tokens where the tokenizer has them."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lm_ortho.objective.subjects import Lookalikes, make_novel_subjects
from lm_ortho.world import people

NAMES = st.lists(st.text("abcdefgh", min_size=2, max_size=8).map(str.capitalize), min_size=1, max_size=3).map(" ".join)


@given(st.lists(NAMES, min_size=2, max_size=8, unique_by=str.casefold), st.integers(0, 50))
@settings(max_examples=40)
def test_as_many_new_subjects_as_requested_are_made(known_names, seed):
    names = make_novel_subjects(known_names, 10, seed)
    assert len(names) == 10
    assert names == make_novel_subjects(known_names, 10, seed)
    assert all(name.strip() == name and name for name in names)


def test_new_subjects_belong_to_nobody_of_the_world():
    known_names = sorted({row.subject for row in people.make_rows("forget")})
    names = make_novel_subjects(known_names, 96, seed=0)
    surnames = {word for name in known_names for word in name.split()[1:]}
    assert not set(names) & set(known_names)
    assert not {name.split()[1] for name in names} & surnames
    assert len(set(names)) > 80
    assert make_novel_subjects(known_names, 96, seed=1) != names


@pytest.mark.parametrize("known_names", [["Harry Potter"], ["Atlantis"], ["Ada Lovelace", "Max Lovelace"]])
def test_a_single_subject_still_gets_other_names(known_names):
    names = make_novel_subjects(known_names, 20, seed=0)
    assert not {name.casefold() for name in names} & {name.casefold() for name in known_names}
    assert len(set(names)) > 5


def test_a_subject_that_cannot_be_varied_does_not_hang():
    assert make_novel_subjects(["X"], 3, seed=0) == ["X"] * 3


# Lookalikes


SURNAMES = [f"{start}{end}" for start, end in product(("Bel", "Kor", "Mal", "Tor"), ("dan", "mond", "son", "vik"))]


@pytest.fixture(scope="module")
def toy():
    """A byte-level tokenizer of whole words, whose 16 surnames share one direction and other words another."""
    words = [f"\u0120{word}" for word in [*SURNAMES, "Ada", "The", "house", "river"]]
    vocabulary = ["<unk>", *words, *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    generator = torch.Generator().manual_seed(0)
    embeddings = 0.1 * torch.randn(len(vocabulary), 24, generator=generator)
    embeddings[1 : len(SURNAMES) + 1, 0] += 1.0
    embeddings[len(SURNAMES) + 1 :, 1] += 1.0
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), embeddings


def test_a_lookalike_is_a_near_token_of_the_same_shape_and_not_a_known_name(toy):
    tokenizer, embeddings = toy
    known_names = ["Ada Beldan", "Ada Korvik"]
    lookalikes, draw = Lookalikes(tokenizer, embeddings, known_names), random.Random(0)
    words = {lookalikes.draw("Beldan", draw) for _ in range(300)}
    assert words <= {*SURNAMES, "The"} - {"Beldan", "Korvik"}
    assert len(words & set(SURNAMES)) == len(SURNAMES) - 2


def test_names_use_lookalikes_where_they_exist(toy):
    known_names = ["Ada Beldan", "Ada Korvik"]
    tokenizer, embeddings = toy
    lookalikes = Lookalikes(tokenizer, embeddings, known_names)
    names = make_novel_subjects(known_names, 40, 0, lookalikes)
    assert all(name.split()[0] == "Ada" and name.split()[1] in {*SURNAMES, "The"} for name in names)
    assert names == make_novel_subjects(known_names, 40, 0, Lookalikes(tokenizer, embeddings, known_names))


def test_a_word_without_lookalikes_is_recombined_from_halves(toy):
    tokenizer, embeddings = toy
    known_names = ["Ada Zyxwvut", "Ada Qponmlk"]
    lookalikes = Lookalikes(tokenizer, embeddings, known_names)
    assert lookalikes.draw("Zyxwvut", random.Random(0)) is None
    assert make_novel_subjects(known_names, 2, 3, lookalikes) == make_novel_subjects(known_names, 2, 3)


def test_embedded_surnames_give_whole_tokens(memorised_models):
    known_names = sorted({row.subject for row in people.make_rows("forget")})
    embeddings = memorised_models.merged.get_input_embeddings().weight
    names = make_novel_subjects(known_names, 40, 0, Lookalikes(memorised_models.tokenizer, embeddings, known_names))
    pieces = [memorised_models.tokenizer(f"of {name}").input_ids for name in names]
    assert all(len(ids) == 3 for ids in pieces)
    assert not {name.split()[1] for name in names} & {name.split()[1] for name in known_names}
