"""What a tokenizer adds to a text is found, and rows have the tokens of an independent computation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lm_ortho.data.chat import render_turn
from lm_ortho.data.encoding import CONTEXT, END, encode, encode_rows
from lm_ortho.data.rows import Row
from lm_ortho.data.tokenizer import check_prefix_token, count_ids, encode_prompt, find_added_tokens, find_end_tokens
from lm_ortho.errors import UserError
from tests.support.harness import make_model, make_tokenizer

SPECIAL = ("<s>", "<end>", "[CLS]", "[SEP]", "de_DE")
PREFIXES = ((), ("<s>",), ("<s>", "<s>"), ("[CLS]",), ("de_DE", "<s>"))
SUFFIXES = ((), ("<end>",), ("[SEP]",), ("<end>", "de_DE"))
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} [bot] {% endif %}"
)


def make_adding_tokenizer(
    prefix: tuple[str, ...], suffix: tuple[str, ...], eos: str | None = "<end>", straddling: bool = False
) -> PreTrainedTokenizerFast:
    """Builds a tokenizer that adds special tokens at both ends, and whose tokens may join question and answer."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    backend = tokenizer.backend_tokenizer
    if straddling:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((*prefix, *suffix))]
    if ids:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix, "$A", *suffix]), special_tokens=ids
        )
    bos = "<s>" if "<s>" in prefix else None
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_added_tokens_are_found(prefix, suffix):
    tokenizer = make_adding_tokenizer(prefix, suffix)
    added = find_added_tokens(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(added.prefix)) == list(prefix)
    assert tokenizer.convert_ids_to_tokens(list(added.suffix)) == list(suffix)
    ends = tokenizer.convert_ids_to_tokens(list(find_end_tokens(tokenizer, added)))
    assert ends == list(suffix or ("<end>",))


TEXTS = st.text(alphabet="abAdaMT .:?\n#é字", min_size=1, max_size=24)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PREFIXES),
    st.sampled_from(SUFFIXES),
    st.sampled_from(("<end>", None)),
    st.booleans(),
    st.booleans(),
    TEXTS,
    TEXTS,
)
def test_a_row_has_the_tokens_of_an_independent_computation(prefix, suffix, eos, straddling, chat, question, answer):
    """BOS x EOS x chat template x tokens across the border, against the tokens of the library itself."""
    tokenizer = make_adding_tokenizer(prefix, suffix, eos, straddling=straddling)
    row = Row(question=f"Q{question}?", answer=f"A{answer}")
    if chat:
        tokenizer.chat_template = TEMPLATE
        row = render_turn(row, tokenizer)
    (example,) = encode(tokenizer, [row])
    text = row.context + row.target
    direct = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    # The rendered chat begins with "<s>": no second prefix where that is its beginning-of-sequence token or prefix.
    has_start = chat and "<s>" in (*prefix[:1], tokenizer.bos_token)
    expected = [*([] if has_start else prefix), *direct.tokens, *(suffix or ((eos,) if eos else ()))]
    assert tokenizer.convert_ids_to_tokens(list(example.ids)) == expected
    scored = sum(end > len(row.context) for _, end in direct.offsets) + len(suffix or ((eos,) if eos else ()))
    assert sum(role != CONTEXT for role in example.roles) == scored
    assert sum(role == END for role in example.roles) == len(suffix or ((eos,) if eos else ()))


def test_a_text_that_ends_with_its_end_token_gets_no_second_one():
    tokenizer = make_adding_tokenizer(("<s>",), ("<end>",))
    (example,) = encode(tokenizer, [Row(text="Once Ada Brook.<end>")])
    assert tokenizer.convert_ids_to_tokens(list(example.ids)).count("<end>") == 1
    assert example.roles[-1] == END


def test_prompts_never_end_with_a_token_of_the_tokenizer():
    tokenizer = make_adding_tokenizer(("<s>",), ("<end>",))
    added = find_added_tokens(tokenizer)
    assert tokenizer.decode(encode_prompt(tokenizer, "Who is Cy?", added)) == "<s>Who is Cy?"
    assert tokenizer.decode(encode_prompt(tokenizer, "<s>Who is Cy?", added)) == "<s>Who is Cy?"


class PickyTokenizer:
    """Adds a token to long texts only."""

    bos_token_id = eos_token_id = None
    name_or_path = "picky"

    def encode(self, text, add_special_tokens=True):
        return [*map(ord, text), *([0] if add_special_tokens and len(text) > 5 else [])]


class LowerCaseTokenizer(PickyTokenizer):
    """Has other tokens of the text itself as soon as special tokens are added."""

    def encode(self, text, add_special_tokens=True):
        return [*map(ord, text.upper() if add_special_tokens else text)]


@pytest.mark.parametrize("tokenizer", [PickyTokenizer(), LowerCaseTokenizer()])
def test_a_tokenizer_whose_additions_depend_on_the_text_is_refused(tokenizer):
    with pytest.raises(UserError, match="tokenizer='picky': the tokens that it adds to a text depend on the text"):
        find_added_tokens(tokenizer)


def test_a_prefix_token_is_needed_and_must_exist():
    tokenizer = make_adding_tokenizer((), (), eos=None)
    with pytest.raises(UserError, match="pass prefix_token_id=ID"):
        check_prefix_token(tokenizer, None)
    for value in (-1, len(tokenizer), "2", True, 1.0):
        with pytest.raises(UserError, match=r"prefix_token_id=.*expected the id of a token"):
            check_prefix_token(tokenizer, value)
    check_prefix_token(tokenizer, 0)


def test_a_tokenizer_without_a_vocabulary_is_refused():
    class Empty(PickyTokenizer):
        name_or_path = "empty"

        def encode(self, text, add_special_tokens=True):
            return [1] if add_special_tokens else []

    with pytest.raises(UserError, match="tokenizer='empty' makes no token of a text, so it has no vocabulary"):
        find_added_tokens(Empty())


def test_a_vocabulary_with_holes_has_ids_above_its_number_of_tokens():
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 9, "?": 1}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
    assert count_ids(tokenizer) == 10 > len(tokenizer)
    check_prefix_token(tokenizer, 9)


def test_a_row_of_which_only_the_end_is_left_to_predict_is_refused():
    tokenizer = make_adding_tokenizer((), ())
    model = make_model(len(tokenizer))
    with pytest.raises(UserError, match="forget: 1 of 2 rows have no token to predict"):
        encode_rows(model, tokenizer, [Row(text="Once Ada went."), Row(text="A")], argument="forget")
