"""Numbers do not depend on what a tokenizer adds to a text, and stored prompts belong to all their ingredients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lm_ortho.data.rows import Row, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness import tokens
from lm_ortho.harness.baseline_model import BaselineLM
from lm_ortho.harness.model import LibOrthoLM, check_model_args
from lm_ortho.harness.token_scores import token_scores
from tests.support.harness import ROWS, make_tokenizer, metric_values, request, run

pytestmark = pytest.mark.usefixtures("isolated_environment")
TASKS = ["forget_set", "verbatim_forget", "membership_set"]


def close_texts(tokenizer: PreTrainedTokenizerFast, suffix: str = "<end>") -> PreTrainedTokenizerFast:
    """Returns a copy that adds ``suffix`` after every text, as ``LlamaTokenizer(add_eos_token=True)`` does."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {suffix}", special_tokens=[(suffix, backend.token_to_id(suffix))]
    )
    return tokenizer


@pytest.fixture(scope="module")
def metadata(home: Path) -> dict[str, str]:
    write_rows(home / "holdout.jsonl", [Row(question=f"Who is {c}?", answer=f"{c} is a poet.") for c in "QRS"])
    return {name: str(home / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}


@pytest.fixture(scope="module")
def expected(home: Path, metadata: dict[str, str]) -> dict[str, dict[str, float]]:
    """The numbers of the checkpoint with its own tokenizer."""
    result = run(LibOrthoLM(str(home / "decomposed"), alpha=0.5, device="cpu"), TASKS, metadata)
    return {task: metric_values(result, task) for task in TASKS}


@pytest.mark.parametrize("suffix", ["<end>", "<pad>"])
def test_a_tokenizer_that_closes_every_text_changes_no_number(
    home: Path, metadata: dict[str, str], expected: dict[str, Any], tmp_path: Path, suffix: str
) -> None:
    close_texts(make_tokenizer(), suffix).save_pretrained(tmp_path)
    arguments = {"pretrained": str(home / "decomposed"), "tokenizer": str(tmp_path), "alpha": 0.5}
    lm = LibOrthoLM(**arguments, device="cpu")
    result = run(lm, TASKS, metadata | arguments)
    assert {task: metric_values(result, task) for task in TASKS} == expected
    assert tokens.resolve(arguments).max_length == lm.max_length == 96


def test_prompts_and_texts_of_other_tasks_are_not_closed(home: Path) -> None:
    plain = BaselineLM(str(home / "plain"), device="cpu")
    closing = BaselineLM(str(home / "plain"), tokenizer=close_texts(plain.tokenizer), device="cpu")
    requests = [request("Question: Who is Cy?\nAnswer:", " Cy is a baker."), request("", "Once Ada Brook went.")]
    assert closing.loglikelihood(requests) == plain.loglikelihood(requests)
    assert token_scores(closing, requests) == token_scores(plain, requests)
    texts = [request("Once Ada Brook went to Marsh Town.", "")]
    texts[0].arguments = texts[0].arguments[:1]
    assert closing.loglikelihood_rolling(texts) == plain.loglikelihood_rolling(texts)
    prompts = [copy.deepcopy(one) for one in requests[:1] * 2]
    for prompt, text in zip(prompts, ("Who is", "Question: Who is Cy?\nAnswer:"), strict=True):
        prompt.arguments = (text, {"until": [], "do_sample": False, "max_gen_toks": 8})
    assert closing.generate_until(prompts) == plain.generate_until(prompts)


def test_a_rendered_chat_has_one_start_in_any_batch(home: Path) -> None:
    lm = BaselineLM(str(home / "plain"), tokenizer=make_tokenizer(bos=True), device="cpu")
    start = lm.tokenizer.bos_token_id
    for strings in (["<s>Ada", "Ada Brook"], ["Ada Brook", "<s>Ada"]):
        ids, mask = lm.tok_batch_encode(strings)
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        assert [row.count(start) for row in rows] == [1, 1]
        assert rows == [lm.tok_encode(string) for string in strings]
    assert lm.tok_batch_encode(["Ada Brook went to Marsh Town"], left_truncate_len=3)[0].shape == (1, 3)


def test_another_model_type_with_such_a_tokenizer_is_refused(home: Path, tmp_path: Path) -> None:
    close_texts(make_tokenizer()).save_pretrained(tmp_path)
    arguments = {"pretrained": str(home / "plain"), "tokenizer": str(tmp_path)}
    with pytest.raises(UserError, match=r"adds '<end>' after every text.*use --model libortho"):
        tokens.resolve(arguments)
    for option in ({"add_bos_token": False}, {"base_url": "http://localhost"}):
        assert tokens.resolve(arguments | option).max_length == 96  # these add nothing to a text


def test_a_tokenizer_without_start_and_end(home: Path, metadata: dict[str, str]) -> None:
    backend = make_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    with pytest.raises(UserError, match=r"neither a beginning-of-sequence nor an end token.*prefix_token_id=ID"):
        LibOrthoLM(str(home / "decomposed"), tokenizer=tokenizer, device="cpu")
    lm = LibOrthoLM(str(home / "decomposed"), tokenizer=tokenizer, prefix_token_id=0, device="cpu")
    own = LibOrthoLM(str(home / "decomposed"), device="cpu")
    for task in ("forget_set", "verbatim_forget"):
        assert metric_values(run(lm, [task], metadata), task)
    both = [metric_values(run(one, ["forget_set"], metadata), "forget_set")["ppl"] for one in (lm, own)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [("~/no/such/tokenizer", "tokenizer='~/no/such/tokenizer': no such directory"), (7, "tokenizer")],
)
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(home: Path, tokenizer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        LibOrthoLM(str(home / "decomposed"), tokenizer=tokenizer, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_home_directory_in_the_path_of_a_tokenizer(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("HOME", str(tmp_path))
    lm = LibOrthoLM(str(home / "decomposed"), tokenizer="~/tokenizer", device="cpu")
    assert lm.tok_encode("Ada")
    found = tokens.resolve({"pretrained": str(home / "plain"), "tokenizer": "~/tokenizer"})
    assert found.max_length == 96


def test_metadata_may_name_a_model_object_in_part(home: Path) -> None:
    tokenizer = close_texts(make_tokenizer())
    lm = LibOrthoLM(str(home / "decomposed"), tokenizer=tokenizer, device="cpu")
    for metadata in ({}, {"pretrained": str(home / "decomposed")}):
        assert tokens.resolve(metadata).tokenizer is lm.tokenizer


def test_a_tokenizer_whose_name_is_a_number(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer().save_pretrained(tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    arguments = {"pretrained": str(home / "decomposed"), "tokenizer": 2024}
    lm = LibOrthoLM(**arguments, device="cpu")
    assert tokens.resolve(arguments).tokenizer is lm.tokenizer
    assert tokens.resolve({"pretrained": str(home / "plain"), "tokenizer": 2024}).max_length == 96


def test_stored_answers_belong_to_the_tokens_that_a_tokenizer_adds(home: Path) -> None:
    plain, closing = (
        LibOrthoLM(str(home / "decomposed"), tokenizer=tokenizer, device="cpu")
        for tokenizer in (make_tokenizer(), close_texts(make_tokenizer()))
    )
    assert plain.fingerprint() != closing.fingerprint()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number from 1 on, auto, or auto:N"),
        ({"batch_size": "auto:"}, "batch_size='auto:' must be"),
        ({"max_batch_size": "x"}, "max_batch_size='x' must be a whole number above 0"),
        ({"max_length": -5}, "max_length=-5 must be a whole number above 0"),
        ({"softmax_dtype": "q"}, "softmax_dtype='q' is unknown"),
        ({"enable_thinking": True}, "enable_thinking needs think_end_token"),
    ],
)
def test_sizes_and_dtypes_are_checked_before_anything_is_loaded(option: dict[str, Any], message: str) -> None:
    for check in (check_model_args, lambda options: LibOrthoLM("/nowhere", **options)):
        with pytest.raises(UserError, match=message):
            check(option)


def test_predict_only_sends_the_same_requests(home: Path, metadata: dict[str, str]) -> None:
    lm = LibOrthoLM(str(home / "decomposed"), device="cpu")
    usual, predictions = (
        run(lm, TASKS, metadata, log_samples=True, predict_only=flag)["samples"] for flag in (False, True)
    )
    for task in TASKS:
        assert [sample["arguments"] for sample in predictions[task]] == [s["arguments"] for s in usual[task]]
        assert [sample["resps"] for sample in predictions[task]] == [s["resps"] for s in usual[task]]


def test_an_answer_longer_than_the_context_names_its_document(home: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "long.jsonl", [ROWS[0], Row(question="What?", answer="Ada went on. " * 60)])
    lm = LibOrthoLM(str(home / "decomposed"), device="cpu")
    with pytest.raises(UserError, match=r"document 1 has \d+ tokens to score .* reads at most 96; shorten the row"):
        run(lm, ["forget_set"], {"forget": str(tmp_path / "long.jsonl")})


def test_a_token_is_no_obstacle(home: Path) -> None:
    assert LibOrthoLM(str(home / "decomposed"), token="secret", alpha=0.5, device="cpu").alpha == 0.5


# ---------------------------------------------------------------- cached requests

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<bot>"
Change = Callable[[LibOrthoLM, dict[str, Any], dict[str, Any]], None]


def set_template(text: str) -> Change:
    def change(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
        lm.tokenizer.chat_template = text

    return change


def set_template_option(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
    lm.tokenizer.chat_template = TEMPLATE + "{{ mood }}"
    lm.chat_template_args = {"mood": "glad"}


def set_option(name: str, value: Any) -> Change:
    def change(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
        options[name] = value

    return change


def set_metadata(name: str, value: Any) -> Change:
    def change(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
        metadata[name] = value

    return change


def set_rows(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
    metadata["forget"] = metadata["retain"]


def set_max_length(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
    lm._max_length = 80


def set_tokenizer(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
    lm.tokenizer = make_tokenizer(bos=True)
    lm.tokenizer.chat_template = TEMPLATE


def set_prefix(lm: LibOrthoLM, metadata: dict[str, Any], options: dict[str, Any]) -> None:
    lm.custom_prefix_token_id = 5


def set_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_ortho.harness.tasks.secret.evaluation_hash", lambda: "another version")


CHANGES: dict[str, Change] = {
    "chat template": set_template(TEMPLATE.replace("<bot>", "<robot>")),
    "options of the template": set_template_option,
    "system instruction": set_option("system_instruction", "Be short."),
    "chat": set_option("apply_chat_template", False),
    "rows": set_rows,
    "length of the prefix": set_metadata("prefix_tokens", 3),
    "context length": set_max_length,
    "tokenizer": set_tokenizer,
    "prefix token": set_prefix,
}


def find_key(lm: LibOrthoLM, metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch, change: Change | None) -> str:
    """Returns the name under which lm-eval stores the requests of ``verbatim_set``."""
    keys: list[str] = []
    monkeypatch.setattr("lm_eval.api.task.load_from_cache", lambda file_name, **_: keys.append(file_name))
    monkeypatch.setattr("lm_eval.api.task.save_to_cache", lambda **_: None)
    arguments, options = dict(metadata), {"apply_chat_template": True, "num_fewshot": 0}
    state = {name: lm.__dict__.get(name) for name in ("tokenizer", "_max_length", "custom_prefix_token_id")}
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template, lm.chat_template_args = TEMPLATE, {}
    try:
        if change is not None:
            change(lm, arguments, options)
        run(lm, ["verbatim_forget"], arguments, cache_requests=True, predict_only=True, **options)
    finally:
        lm.__dict__ |= state
    (key,) = keys
    return key


def test_every_ingredient_of_a_prompt_is_in_the_key_of_cached_requests(
    home: Path, metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LibOrthoLM(str(home / "decomposed"), device="cpu")
    plain = find_key(lm, metadata, monkeypatch, None)
    assert find_key(lm, metadata, monkeypatch, None) == plain
    lm.alpha = 0.25  # shapes no prompt
    assert find_key(lm, metadata, monkeypatch, None) == plain
    keys = {name: find_key(lm, metadata, monkeypatch, change) for name, change in CHANGES.items()}
    set_code(monkeypatch)
    keys["code"] = find_key(lm, metadata, monkeypatch, None)
    assert [name for name, key in keys.items() if key == plain] == []
    assert len(set(keys.values())) == len(keys)


def test_tasks_of_lm_eval_get_another_name_for_another_template(home: Path) -> None:
    lm = LibOrthoLM(str(home / "decomposed"), device="cpu")
    names = set()
    for template, options in ((TEMPLATE, {}), (TEMPLATE + "!", {}), (TEMPLATE + "{{ mood }}", {"mood": "glad"})):
        lm.tokenizer.chat_template, lm.chat_template_args = template, options
        names.add(lm.tokenizer_name)
    assert len(names) == 3
