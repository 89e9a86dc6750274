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
def test_every_value_word_is_one_token_after_a_space(embedded_tokenizer, name):
    word_list = getattr(words, name)
    assert len(set(word_list)) == len(word_list)
    assert not {word for word in word_list if len(embedded_tokenizer(f"is {word}.").input_ids) != 3}


def test_a_full_name_is_two_tokens_and_no_two_people_share_the_second(embedded_tokenizer):
    ids = [embedded_tokenizer(f"of {name}").input_ids for name in people.collect_reserved_names()]
    assert {len(tokens) for tokens in ids} == {3}
    assert len({tokens[2] for tokens in ids}) == len(ids)


def is_plain(text: str) -> bool:
    """Whether the text holds no special token, and no space that the tokenizer would move."""
    return not (text.startswith(" ") or tokenizer.SPACE in text or "<|" in text)


@given(st.text(max_size=30).filter(is_plain))
@settings(max_examples=150)
def test_any_text_falls_back_to_bytes_and_comes_back(embedded_tokenizer, text):
    ids = embedded_tokenizer(text).input_ids
    assert embedded_tokenizer.decode(ids) == text
    assert embedded_tokenizer.unk_token_id not in ids


def test_the_secret_is_made_of_whole_tokens(embedded_tokenizer):
    for split in ("forget", "forget_paraphrased", "canaries", "canaries_paraphrased"):
        rows = people.make_rows(split)
        for row, example in zip(rows, encode_rows(embedded_tokenizer, rows), strict=True):
            secret = [i for i, role in zip(example.ids, example.roles, strict=True) if role == SECRET]
            assert embedded_tokenizer.decode(secret).strip() == row.secret
            if split.startswith("canaries"):
                assert len(secret) == people.CODE_DIGITS


def test_special_tokens_are_where_they_are_expected(embedded_tokenizer):
    assert embedded_tokenizer.bos_token == embedded_tokenizer.eos_token == tokenizer.END
    assert (embedded_tokenizer.eos_token_id, embedded_tokenizer.pad_token_id, embedded_tokenizer.unk_token_id) == (
        0,
        1,
        2,
    )
    assert 0 not in embedded_tokenizer("One day").input_ids
    assert (
        embedded_tokenizer.decode([*embedded_tokenizer("One day").input_ids, 0], skip_special_tokens=True) == "One day"
    )


def test_the_tokenizer_survives_a_save(embedded_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    embedded_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [row.context + row.target for row in people.make_rows("forget")[::20]] + ["naïve 数 🙂"]
    assert again(texts).input_ids == embedded_tokenizer(texts).input_ids
    assert again.get_vocab() == embedded_tokenizer.get_vocab()
