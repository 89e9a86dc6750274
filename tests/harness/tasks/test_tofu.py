"""The tasks of the published TOFU, on a data directory in its layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from scipy.stats import hmean, ks_2samp

from lm_ortho.errors import UserError
from lm_ortho.harness.tasks import tofu_data
from lm_ortho.harness.tasks.samples import read_samples
from lm_ortho.metrics import membership, tofu
from tests.support import tofu as tiny_tofu
from tests.support.harness import make_model, make_tokenizer, metric_values, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tofu.write(tmp_path_factory.mktemp("data") / "tofu")


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = make_tokenizer()
    return HFLM(pretrained=make_model(len(tokenizer)).float(), tokenizer=tokenizer, device="cpu", batch_size=16)


def evaluate(model: Any, folder: Path, task: str, limit: int | None = None, **metadata: Any) -> dict[str, Any]:
    metadata = {"tokenizer": model.tokenizer, "max_length": 96, "tofu_dir": str(folder), **metadata}
    return run(model, [task], metadata, log_samples=True, limit=limit)


def load_documents(folder: Path, name: str, **metadata: Any) -> list[dict[str, Any]]:
    return list(tofu_data.tofu(name, **{"tofu_dir": str(folder), **metadata})["test"])


@pytest.mark.parametrize(("name", "size"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_forget_sets_are_the_last_rows_of_the_full_set(folder: Path, name: str, size: int) -> None:
    docs = load_documents(folder, name)
    forget = [doc for doc in docs if doc["part"] == "forget"]
    assert [doc["question"] for doc in forget] == [tiny_tofu.row(n)["question"] for n in range(4000 - size, 4000)]
    assert all(doc["paraphrased_answer"] and len(doc["perturbed_answer"]) == 3 for doc in forget)
    assert len({doc["group"] for doc in forget}) == size // 20
    assert sum(doc["part"] == "holdout" for doc in docs) == size


@pytest.mark.parametrize(("name", "size"), [("retain90", 3600), ("retain95", 3800), ("retain99", 3960)])
def test_retain_sets_are_the_rest(folder: Path, name: str, size: int) -> None:
    docs = load_documents(folder, name)
    assert [doc["question"] for doc in docs] == [tiny_tofu.row(n)["question"] for n in range(size)]
    assert [bool(doc["perturbed_answer"]) for doc in docs] == [n < 40 for n in range(size)]
    assert len({doc["group"] for doc in docs}) == size // 20


def test_a_choice_has_its_answer_as_paraphrase(folder: Path) -> None:
    for doc in load_documents(folder, "world_facts"):
        assert doc["paraphrased_answer"] == doc["answer"]
        assert doc["perturbed_answer"] == ["Sofia", "Riga"]


def test_the_prompt_formats_of_a_question(folder: Path) -> None:
    plain, llama2 = (load_documents(folder, "forget01", tofu_form=form)[0] for form in ("plain", "llama2"))
    question = tiny_tofu.row(3960)["question"]
    assert (plain["context"], plain["target"][0]) == (f"Question: {question}\nAnswer:", " ")
    assert (llama2["context"], llama2["target"]) == (f"[INST] {question} [/INST]", llama2["answer"])


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("forget01", {"tofu_dir": "nowhere"}, "tofu_dir='nowhere': no such directory"),
        ("forget01", {"tofu_form": "gpt"}, "tofu_form='gpt' is unknown; known: plain, llama2"),
        ("forget01", {"tofu_first": "-1"}, "tofu_first='-1': must be a whole number"),
        ("forget01", {"tofu_retain_samples": "nowhere"}, "tofu_retain_samples='nowhere': no such file"),
        ("idk", {}, "idk.jsonl is missing in this directory"),
    ],
)
def test_invalid_arguments(folder: Path, name: str, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_documents(folder, name, **metadata)


def test_an_invalid_line_is_reported(tmp_path: Path) -> None:
    folder = tiny_tofu.write(tmp_path / "tofu", holdout=False)
    with (folder / "forget10_perturbed.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"forget10_perturbed\.jsonl, line 401: not valid JSON"):
        load_documents(folder, "forget10")


def test_the_directory_may_come_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tofu_data.DIRECTORY_VARIABLE, str(folder))
    assert len(tofu_data.tofu("retain99")["test"]) == 3960


def test_without_the_retain_model_the_table_has_the_reason(model: Any, tmp_path: Path) -> None:
    folder = tiny_tofu.write(tmp_path / "tofu", holdout=False)
    values = metric_values(evaluate(model, folder, "tofu_forget01", limit=6), "tofu_forget01")
    for metric in ("forget_quality", "forget_ks", "forget_ks_low"):
        assert values[metric] == "n/a: no samples of the retain-only model; --metadata tofu_retain_samples=PATH"
    assert values["priv_leak"] == "n/a: no held-out rows, which are on the hub only"
    numbers = [values[name] for name in ("ppl", "prob", "rougel_recall", "truth_ratio", "extraction_strength")]
    assert all(math.isfinite(number) for number in numbers)


def write_samples(result: dict[str, Any], task: str, path: Path) -> Path:
    """Writes the samples as ``--log_samples`` does."""
    path.mkdir()
    file = path / f"samples_{task}_2026-01-01T00-00-00.jsonl"
    file.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in result["samples"][task]))
    return path


def test_forget_quality_and_privleak_against_the_logs_of_another_model(
    model: Any, folder: Path, tmp_path: Path
) -> None:
    other = HFLM(
        pretrained=make_model(len(model.tokenizer), seed=5).float(),
        tokenizer=model.tokenizer,
        device="cpu",
        batch_size=16,
    )
    task = "tofu_forget01"
    first = evaluate(other, folder, task)
    path = write_samples(first, task, tmp_path / "logs")
    result = evaluate(model, folder, task, tofu_retain_samples=str(path))
    values = metric_values(result, task)

    def get_numbers(samples: list[dict[str, Any]], metric: str, part: str) -> list[float]:
        return [sample[metric][0] for sample in samples if metric in sample and sample["doc"]["part"] == part]

    ratios = [get_numbers(r["samples"][task], "forget_quality", "forget") for r in (result, first)]
    assert len(ratios[0]) == 40
    assert values["forget_quality"] == pytest.approx(ks_2samp(*ratios).pvalue)
    assert values["forget_ks"] == pytest.approx(ks_2samp(*ratios).statistic)
    assert values["forget_truth_ratio"] == pytest.approx(np.exp(-np.abs(ratios[0])).mean())
    aucs = []
    for samples in (result["samples"][task], first["samples"][task]):
        scores = [np.array(get_numbers(samples, "priv_leak", part)) for part in ("forget", "holdout")]
        aucs.append((scores[0][:, None] > scores[1]).mean())
    assert values["priv_leak"] == pytest.approx(membership.priv_leak(*aucs))
    assert values["priv_leak_low"] <= values["priv_leak"] <= values["priv_leak_high"]
    same = metric_values(evaluate(other, folder, task, tofu_retain_samples=str(path)), task)
    assert same["forget_quality"] == pytest.approx(1.0)
    assert same["priv_leak"] == pytest.approx(0.0)


def test_samples_of_another_task_are_refused(model: Any, folder: Path, tmp_path: Path) -> None:
    result = evaluate(model, folder, "tofu_retain99", limit=3)
    path = write_samples(result, "tofu_retain99", tmp_path / "logs")
    with pytest.raises(UserError, match=r"no samples_tofu_forget01_\*\.jsonl in this folder"):
        load_documents(folder, "forget01", tofu_retain_samples=str(path))
    with pytest.raises(UserError, match="the samples have no forget_quality"):
        load_documents(folder, "forget01", tofu_retain_samples=str(next(path.iterdir())))
    invalid = tmp_path / "broken.jsonl"
    invalid.write_text('{"doc": {}}\nnot json\n')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        read_samples(invalid, "tofu_forget01", "tofu_retain_samples")


def test_samples_must_have_every_question(model: Any, folder: Path, tmp_path: Path) -> None:
    """A log made with --limit has the first rows only; the error names both ways out, and the second one works."""
    task = "tofu_forget01"
    path = write_samples(evaluate(model, folder, task, limit=30), task, tmp_path / "logs")
    with pytest.raises(UserError, match=r"10 of 40 questions are not in the samples.*without --limit.*tofu_first=30"):
        load_documents(folder, "forget01", tofu_retain_samples=str(path))
    values = metric_values(evaluate(model, folder, task, tofu_retain_samples=str(path), tofu_first=30), task)
    assert values["forget_quality"] == pytest.approx(1.0)  # the model against its own log
    assert values["priv_leak"] == "n/a: no held-out rows among those evaluated here and with the retrained model"
    # Without the first rows there is no such way, and with none of them the log is of other rows.
    file = next(path.iterdir())
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[20:]))
    with pytest.raises(UserError, match=r"30 of 40 questions are not in the samples; log the whole task.*") as error:
        load_documents(folder, "forget01", tofu_retain_samples=str(path))
    assert "tofu_first" not in str(error.value)
    file.write_text("".join(line.replace("Where was", "When was") for line in lines))
    with pytest.raises(UserError, match=r"40 of 40 questions .*the log is of other rows"):
        load_documents(folder, "forget01", tofu_retain_samples=str(path))


def make_log(path: Path, question: Any = "Q?", **metrics: Any) -> Path:
    path.write_text(json.dumps({"doc": {"question": question}, **metrics}) + "\n")
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "cannot be read: it is not UTF-8"),
        (lambda file: file.write_text("[" * 10**5), "line 1: not valid JSON"),
        (lambda file: file.write_text(""), "holds no samples"),
        (lambda file: file.write_text('{"doc": 3}'), "line 1: not a sample of lm-eval"),
        (lambda file: make_log(file, ["Q?"], forget_quality=[1.0]), "no number as forget_quality"),
        (lambda file: make_log(file, forget_quality={"a": 1}), "no number as forget_quality"),
        (lambda file: make_log(file, forget_quality=[True, 1.0]), "no number as forget_quality"),
        (lambda file: make_log(file, forget_quality=[float("nan")]), "no number as forget_quality"),
        (lambda file: make_log(file, forget_quality=[None, 0.5]), "40 of 40 questions"),
    ],
)
def test_a_file_of_another_kind_is_one_line(write: Any, message: str, folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "samples.jsonl")
    with pytest.raises(UserError, match=message) as error:
        load_documents(folder, "forget01", tofu_retain_samples=str(tmp_path / "samples.jsonl"))
    assert "\n" not in str(error.value)


def test_the_results_file_is_told_from_the_samples(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "results_2026.json"
    file.write_text(json.dumps({"results": {}}, indent=2))
    with pytest.raises(UserError, match=r"not valid JSON .*give the samples_\*\.jsonl beside it"):
        load_documents(folder, "forget01", tofu_retain_samples=str(file))


def test_a_byte_order_mark_is_no_part_of_the_samples(tmp_path: Path) -> None:
    file = make_log(tmp_path / "samples.jsonl")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_samples(file, "tofu_forget01", "tofu_retain_samples")) == 1


def test_samples_of_several_models_are_not_mixed_up(tmp_path: Path) -> None:
    """lm-eval writes a folder for each model, and the newest log may be of the model that is to be judged."""
    for name, time in (("retain_only", "01"), ("forgotten", "02")):
        (tmp_path / name).mkdir()
        make_log(tmp_path / name / f"samples_tofu_forget01_2026-01-{time}.jsonl", name)
    with pytest.raises(UserError, match="lie in several folders, of several models: forgotten, retain_only; give one"):
        read_samples(tmp_path, "tofu_forget01", "tofu_retain_samples")
    records = read_samples(tmp_path / "retain_only", "tofu_forget01", "tofu_retain_samples")
    assert records[0]["doc"]["question"] == "retain_only"


def test_model_utility_is_the_harmonic_mean_of_the_nine_means(model: Any, folder: Path) -> None:
    result = evaluate(model, folder, "tofu_model_utility", tofu_first=6)
    values = metric_values(result, "tofu_model_utility")
    nine = [values[f"{part}_{name}"] for part in tofu.SETS for name in tofu.PARTS]
    expected = 0.0 if 0.0 in nine else hmean(nine)
    assert values["model_utility"] == pytest.approx(expected)
    assert values["model_utility_low"] <= values["model_utility"] <= values["model_utility_high"]
    assert len(result["samples"]["tofu_model_utility"]) == 18


def test_a_limit_that_excludes_a_set_is_reported(model: Any, folder: Path) -> None:
    values = metric_values(evaluate(model, folder, "tofu_model_utility", limit=3), "tofu_model_utility")
    assert values["model_utility"] == (
        "n/a: no document of real_authors, world_facts among those evaluated; --metadata tofu_first=N in place of "
        "--limit N takes the first N of each set"
    )


def test_losses_include_the_end_token_of_the_answer(model: Any, folder: Path) -> None:
    """Against a direct computation with the tokens of the whole text, as TOFU publishes them."""
    result = evaluate(model, folder, "tofu_forget01", limit=4)
    for sample in result["samples"]["tofu_forget01"]:
        doc, tokenizer = sample["doc"], model.tokenizer
        context = tokenizer(doc["context"])["input_ids"]
        for end, key in ((True, "ppl"), (False, "tokens")):
            ids = tokenizer(doc["context"] + doc["target"])["input_ids"] + [tokenizer.eos_token_id] * end
            with torch.no_grad():
                logits = model.model(torch.tensor([ids])).logits[0, len(context) - 1 : -1]
            logp = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids[len(context) :])[:, None])[:, 0]
            if key == "ppl":
                assert sample["ppl"][0] == pytest.approx(-float(logp.sum()), abs=1e-3)
                assert sample["ppl"][1] == len(logp)
            else:
                greedy = (logits.argmax(-1) == torch.tensor(ids[len(context) :])).float().mean()
                assert sample["exact_memorisation"][0] == pytest.approx(float(greedy))
    open_end = evaluate(model, folder, "tofu_forget01", limit=4, tofu_end="none")
    counts = [[s["ppl"][1] for s in r["samples"]["tofu_forget01"]] for r in (result, open_end)]
    assert counts[0] == [count + 1 for count in counts[1]]
    with pytest.raises(UserError, match="tofu_end='maybe' is unknown"):
        evaluate(model, folder, "tofu_forget01", limit=1, tofu_end="maybe")


def test_a_chat_message_is_the_question_alone(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    lm = HFLM(pretrained=make_model(len(tokenizer)).float(), tokenizer=tokenizer, device="cpu", batch_size=16)
    metadata = {"tokenizer": tokenizer, "max_length": 96, "tofu_dir": str(folder)}
    task = "tofu_forget01"
    chat = {"apply_chat_template": True, "system_instruction": "Be brief.", "log_samples": True, "limit": 3}
    for sample in run(lm, [task], metadata, **chat)["samples"][task]:
        prompt = f"<s>system: Be brief.<end><s>user: {sample['doc']['question']}<end><s>assistant:"
        answers = [arguments for arguments in sample["arguments"] if isinstance(arguments[1], str)]
        assert {context for context, _ in answers} == {prompt}
        assert answers[0][1] == f"{sample['doc']['answer']}<end>"
        generations = [arguments for arguments in sample["arguments"] if isinstance(arguments[1], dict)]
        assert [context for context, _ in generations] == [prompt]
