"""The embedded tokenizer: names and values are whole tokens, and every text comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.data.encoding import SECRET
from lm_ortho.data.encoding import encode as encode_rows
from lm_ortho.world import people, tokenizer, words

VALUE_LISTS = [name for name, value in vars(words).items() if name.isupper() and not name.startswith("_")]


@pytest.mark.parametrize("name", VALUE_LISTS)
def test_every_value_word_is_one_token_after_a_space(pieces, name):
    listed = getattr(words, name)
    assert len(set(listed)) == len(listed)
    assert not {word for word in listed if len(pieces(f"is {word}.").input_ids) != 3}


def test_a_full_name_is_two_tokens_and_no_two_people_share_the_second(pieces):
    ids = [pieces(f"of {name}").input_ids for name in people.reserved_names()]
    assert {len(tokens) for tokens in ids} == {3}
    assert len({tokens[2] for tokens in ids}) == len(ids)


def is_plain(text: str) -> bool:
    """Whether the text holds no special token, and no space that the tokenizer would move."""
    return not (text.startswith(" ") or tokenizer.SPACE in text or "<|" in text)


@given(st.text(max_size=30).filter(is_plain))
@settings(max_examples=150)
def test_any_text_falls_back_to_bytes_and_comes_back(pieces, text):
    ids = pieces(text).input_ids
    assert pieces.decode(ids) == text
    assert pieces.unk_token_id not in ids


def test_the_secret_is_made_of_whole_tokens(pieces):
    for split in ("forget", "forget_paraphrased", "canaries", "canaries_paraphrased"):
        rows = people.rows(split)
        for row, example in zip(rows, encode_rows(pieces, rows), strict=True):
            secret = [i for i, role in zip(example.ids, example.roles, strict=True) if role == SECRET]
            assert pieces.decode(secret).strip() == row.secret
            if split.startswith("canaries"):
                assert len(secret) == people.CODE_DIGITS


def test_special_tokens_are_where_they_are_expected(pieces):
    assert pieces.bos_token == pieces.eos_token == tokenizer.END
    assert (pieces.eos_token_id, pieces.pad_token_id, pieces.unk_token_id) == (0, 1, 2)
    assert 0 not in pieces("One day").input_ids
    assert pieces.decode([*pieces("One day").input_ids, 0], skip_special_tokens=True) == "One day"


def test_the_tokenizer_survives_a_save(pieces, tmp_path):
    from transformers import AutoTokenizer

    pieces.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [row.context + row.target for row in people.rows("forget")[::20]] + ["naïve 数 🙂"]
    assert again(texts).input_ids == pieces(texts).input_ids
    assert again.get_vocab() == pieces.get_vocab()
