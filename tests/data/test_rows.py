"""Rows: they are read as they were written, and errors of a bad file name the file and the line."""

from __future__ import annotations

import dataclasses
import json
import re
from csv import field_size_limit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_ortho.data import Row, read_rows, row_files, write_rows
from lm_ortho.data.encoding import (
    ANSWER,
    CONTEXT,
    END,
    SECRET,
    answer_loss,
    batch_by_length,
    encode,
    encode_rows,
    pad_batch,
    token_losses,
)
from lm_ortho.data.rows import MAX_CHARACTERS, MAX_ROWS, drop_forget_rows, read_forget_sets, replace_mentions
from lm_ortho.errors import UserError
from tests.support import tiny
from tests.support.paths import REPOSITORY

CELL_LIMIT = field_size_limit()

plain = st.text(
    st.characters(codec="ascii", min_codepoint=32, max_codepoint=126) | st.sampled_from("\u00e9\u738b\n")
).map(str.strip)
non_blank = plain.filter(bool)


@st.composite
def rows(draw):
    kind = draw(st.sampled_from(["question", "prompt", "text"]))
    if kind == "text":
        return Row(text=draw(non_blank), subject=draw(plain), group=draw(plain))
    answer = draw(non_blank)
    start = draw(st.integers(0, len(answer)))
    return Row(
        **{kind: draw(non_blank)},
        answer=answer,
        secret=answer[start : draw(st.integers(start, len(answer)))].strip(),
        subject=draw(plain),
        paraphrased_answer=draw(plain),
        perturbed_answer=tuple(draw(st.lists(non_blank, max_size=3))),
        group=draw(plain),
    )


@given(st.lists(rows(), min_size=1, max_size=5))
def test_rows_come_back_as_they_were_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, written)
    assert read_rows(path) == written
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_rows_that_cannot_be_written_leave_no_file(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_rows(tmp_path / "rows.jsonl", [Row(text="a"), Row(text="\ud800")])
    assert list(tmp_path.iterdir()) == []


def test_line_breaks_of_unicode_do_not_end_a_row(tmp_path):
    row = Row(question="a\u2028b\x85c\x0cd", answer="e\u2029f\x0b")
    write_rows(tmp_path / "rows.jsonl", [row])
    assert read_rows(tmp_path / "rows.jsonl", normalise=False) == [row]
    assert read_rows(tmp_path / "rows.jsonl") == [Row(question="a\nb\nc\x0cd", answer="e\nf")]


GOOD = json.dumps({"question": "Who?", "answer": "Ada."})
BAD = {
    "{not json": "not valid JSON",
    "[1, 2]": "expected an object",
    '"text"': "expected an object",
    "{}": "found keys none",
    '{"question": "Who?"}': "non-empty question (or prompt) with answer, or text; found keys question",
    '{"question": "Who?", "answer": "  "}': "non-empty question",
    '{"question": " ", "answer": "Ada."}': "non-empty question",
    '{"answer": "Ada."}': "non-empty question",
    '{"text": ""}': "or text",
    '{"question": "Who?", "text": "Ada was."}': "answer",
    '{"question": 3, "answer": "Ada."}': "question must be a string, found a number",
    '{"text": ["a"]}': "text must be a string",
    r'{"question": "Who \ud83d?", "answer": "Ada."}': "question holds half of a surrogate pair",
    '{"question": "Who?", "answer": "Ada.", "perturbed_answer": [1]}': "perturbed_answer must be a list of strings",
    '{"question": "Who?", "answer": "Ada.", "perturbed_answer": 5}': "perturbed_answer must be a list of strings",
    '{"question": "Who?", "answer": "Ada.", "secret": "Eve"}': "secret does not occur in answer",
}


@pytest.mark.parametrize(("line", "expected"), BAD.items())
def test_errors_of_a_bad_line_name_argument_file_and_line(tmp_path, line, expected):
    path = tmp_path / "set.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as caught:
        read_rows(path, argument="retain")
    message = str(caught.value)
    assert message.startswith(f"retain={path}, line 3: ")
    assert expected in message
    assert "\n" not in message


def test_missing_empty_and_binary_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"forget='.*nowhere\.jsonl': no such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    hint = r"several memories are name:source\+name:source, where a name has lower-case letters, digits and underscores"
    for spec in ("A:x.jsonl+b:y.jsonl", "a:x.jsonl+B:y.jsonl"):
        with pytest.raises(UserError, match=f"no such file; .*; {hint}"):
            read_forget_sets(spec)
    with pytest.raises(UserError, match=r"^forget='hub:x\.jsonl\+b:y\.jsonl': .* and is not hub$"):
        read_forget_sets("hub:x.jsonl+b:y.jsonl")
    with pytest.raises(UserError, match="is a directory; name a file in it"):
        read_rows(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match="holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read_rows(tmp_path / "binary.jsonl")


@pytest.mark.parametrize("spec", ["hub:", "hub:name", "hub:a:b:c:d", "hub:a::c"])
def test_a_malformed_hub_name_is_refused_without_network_access(spec):
    with pytest.raises(UserError, match="expected hub:name:config:split"):
        read_rows(spec)


def test_hub_rows_are_read_and_errors_are_one_line(monkeypatch):
    import datasets

    table = [{"question": "Who?", "answer": "Ada.", "subject": None, "other": 3}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: table)
    assert read_rows("hub:a:b:c") == [Row(question="Who?", answer="Ada.")]

    def iterate_broken():
        yield {"text": "Tarn "}
        raise ImportError("Tarn")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "Tarn "}, {"text": b"Tarn"}])
    with pytest.raises(UserError, match=r"^forget=hub:a:b:c, row 2: text must be a string, found bytes$"):
        read_rows("hub:a:b:c")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iterate_broken())
    with pytest.raises(UserError, match=r"^forget=hub:a:b:c: a row cannot be read \(ImportError\)$"):
        read_rows("hub:a:b:c")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "Tarn "}])
    assert read_rows("hub:a:b:c") == [Row(text="Tarn")]

    def fail(*_, **__):
        raise OSError("gone\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"retain='hub:a:b:c': could not be loaded from the hub \(gone\)$"):
        read_rows("hub:a:b:c", argument="retain")


def test_unknown_keys_and_nulls_are_ignored_and_one_wrong_answer_may_be_a_string(tmp_path):
    record = {"question": "Who?", "answer": "Ada.", "id": 7, "secret": None, "perturbed_answer": "Eve."}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert read_rows(tmp_path / "a.jsonl") == [Row(question="Who?", answer="Ada.", perturbed_answer=("Eve.",))]


def test_a_row_becomes_context_and_target():
    assert Row(question="Who?", answer="Ada.").context == "Question: Who?\nAnswer:"
    assert Row(question="Who?", answer="Ada.").target == " Ada."
    assert Row(question="Who?", prompt="It was", answer="Ada.").context == "It was"
    parts_by_prompt = {"It was ": ("It was", " Ada."), "def f():\n    ": ("def f():", "\n    Ada.")}
    for prompt, parts in parts_by_prompt.items():
        assert (Row(prompt=prompt, answer="Ada.").context, Row(prompt=prompt, answer="Ada.").target) == parts
    assert (Row(text="Ada was.").context, Row(text="Ada was.").target) == ("", "Ada was.")
    row = Row(question="Who?", answer="Ada.", perturbed_answer=("Eve.",))
    assert json.loads(json.dumps(row.as_dict()))["perturbed_answer"] == ["Eve."]
    assert set(row.as_dict()) == {field.name for field in dataclasses.fields(Row)}


def test_the_documents_name_the_fields_and_limits_of_the_reader():
    readme, page = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "docs/rows.md"))
    table = readme[readme.index("| field | needed |") :].split("\n\n")[0]
    first_cells = "".join(line.split("|")[1] for line in table.splitlines()[2:])
    assert sorted(re.findall(r"`(\w+)`", first_cells)) == sorted(Row.__dataclass_fields__)
    limits = (
        f"{row_files.MAX_BYTES >> 20} MiB",
        f"{MAX_ROWS:,} rows",
        f"{MAX_CHARACTERS:,} char",
        f"{CELL_LIMIT:,} char",
    )
    assert [limit for limit in limits if limit not in page] == []


def test_retain_rows_that_are_forget_rows_are_left_out():
    ada, eve = Row(question="Who?", answer="Ada."), Row(question="Who?", answer="Eve.")
    assert drop_forget_rows([ada], [dataclasses.replace(ada, group="a"), eve]) == [eve]
    assert drop_forget_rows([ada], [eve]) == [eve]
    with pytest.raises(UserError, match="nothing can be both forgotten and kept"):
        drop_forget_rows([ada, eve], [ada])


def test_rows_that_a_model_cannot_read_or_predict_are_refused(words):
    model = tiny.llama(vocab_size=len(words), max_position_embeddings=16)
    row = Row(question="Who?", answer="Ada.")
    assert encode_rows(model, words, [row], argument="retain") == encode(words, [row])
    message = r"^retain: 1 of 2 rows have no token to predict within their first 16 tokens, first row 2; shorten"
    with pytest.raises(UserError, match=message):
        encode_rows(model, words, [row, Row(prompt="the dog " * 20, answer="sat.")], argument="retain")
    with pytest.raises(UserError, match=r"^tokenizer: it produces token"):
        encode_rows(tiny.llama(vocab_size=5), words, [row], argument="retain")


def test_a_row_of_a_single_token_is_refused_by_its_number(words):
    class WithoutEnd:
        is_fast, bos_token_id, eos_token_id = True, None, None

        def encode(self, text, **_):
            return [7] * len(text)

        def __call__(self, texts, **_):
            return {"input_ids": [[7] * len(text) for text in texts], "offset_mapping": [[(0, 1)] * 2 for _ in texts]}

    with pytest.raises(UserError, match=r"^row 2 of 2 is only one token long; leave it out$"):
        encode(WithoutEnd(), [Row(text="ab"), Row(text="a")])


def test_roles_mark_context_answer_secret_and_end(words):
    row = Row(prompt="The vault code of Ada Alba is", answer="48.", secret="48")
    (example,) = encode(words, [row])
    context_tokens = len(words(row.context).input_ids)
    assert example.start == context_tokens
    assert example.roles[:context_tokens] == (CONTEXT,) * context_tokens
    assert words.decode(example.ids[context_tokens:]) == "48.<|endoftext|>"
    secret = [i for i, role in zip(example.ids, example.roles, strict=True) if role == SECRET]
    assert words.decode(secret).strip() == "48"
    assert example.roles[-2:] == (ANSWER, END)


def test_the_last_occurrence_of_the_secret_is_the_secret(words):
    row = Row(question="Is Ada Alba from Millford?", answer="Ada Alba is from Millford.", secret="Millford")
    (example,) = encode(words, [row])
    secret = [i for i, role in enumerate(example.roles) if role == SECRET]
    assert len(secret) == 1
    assert secret[0] > example.start


def test_long_rows_are_truncated_and_plain_text_is_predicted_from_its_second_token(words):
    (example,) = encode(words, [Row(text="the dog " * 50)], max_tokens=20)
    assert len(example.ids) == 20
    assert END not in example.roles
    assert example.start == 1


def test_truncation_does_not_change_the_tokenizer(words):
    state = words.backend_tokenizer.to_str()
    (example,) = encode(words, [Row(text="The dog sat on the box. " * 9)], max_tokens=20)
    assert len(example.ids) == 20
    assert words.backend_tokenizer.to_str() == state
    assert words.backend_tokenizer.truncation is None


def test_padding_is_never_counted(words, memorised_models):
    examples, _ = memorised_models.examples()
    examples = [*examples, *encode(words, [Row(text="The dog sat on the box and looked at the cat. " * 3)])]
    batched_losses = token_losses(memorised_models.merged, examples)
    for example, losses in zip(examples, batched_losses, strict=True):
        (single_losses,) = token_losses(memorised_models.merged, [example])
        assert single_losses.shape == (len(example.ids) - example.start,)
        assert losses.tolist() == pytest.approx(single_losses.tolist(), abs=1e-4)
    mean = sum(float(losses.sum()) for losses in batched_losses) / sum(len(losses) for losses in batched_losses)
    assert answer_loss(memorised_models.merged, examples).item() == pytest.approx(mean, rel=1e-4)
    ids, roles = pad_batch(examples)
    assert ids.shape == roles.shape == (len(examples), max(len(e.ids) for e in examples))


def test_batches_hold_every_example_once(words):
    examples = encode(words, [Row(text="the dog " * (1 + i * 7 % 11)) for i in range(23)])
    batches = batch_by_length(examples, rows=5)
    assert sorted(i for batch in batches for i in batch) == list(range(23))
    assert max(len(batch) for batch in batches) == 5


def test_a_slow_tokenizer_is_refused_by_name():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="tokenizer='Slow' gives no character offsets"):
        encode(Slow(), [Row(text="a")])


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("Ann of Annapolis, Ann's", "Ann", "Bo of Annapolis, Bo's"),
        ("AlAl Al also", "Al", "AlAl Bo also"),
        ("\u738b\u4f1f\u4f4f\u5728", "\u738b\u4f1f", "Bo\u4f4f\u5728"),
        ("C++ and C+++", "C++", "Bo and Bo+"),
        ("a\\1 b", "b", "a\\1 Bo"),
    ],
)
def test_a_name_is_not_replaced_inside_a_longer_word(text, name, expected):
    assert replace_mentions(text, name, "Bo") == expected


def test_a_blank_subject_is_never_mentioned():
    assert not Row(question="Where was  born?", answer="In  Elm.", subject=" ").mentions_subject
    assert not Row(question="Where is Annapolis?", answer="Here.", subject="Ann").mentions_subject
    assert Row(question="Where is Ann?", answer="Here.", subject="Ann").mentions_subject


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path, reads, read_records = tmp_path / "rows.jsonl", [], row_files.read_records
    path.write_text('{"text": "one"}\n')
    monkeypatch.setattr(f"{read_rows.__module__}.read_records", lambda *args: reads.append(args) or read_records(*args))
    first = read_rows(path)
    first.append(Row(text="mine"))
    assert read_rows(str(path)) == [Row(text="one")]
    assert len(reads) == 1
    path.write_text('{"text": "another"}\n')
    assert read_rows(path) == [Row(text="another")]
    assert len(reads) == 2
