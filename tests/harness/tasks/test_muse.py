"""The MUSE tasks, on a data directory in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score

from lm_ortho.errors import UserError
from lm_ortho.harness.tasks import muse
from lm_ortho.harness.tokens import Tokens
from lm_ortho.metrics.membership import priv_leak
from tests.support import muse as tiny_muse
from tests.support.harness import make_model, make_tokenizer, metric_values, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_muse.write(tmp_path_factory.mktemp("data") / "muse")


def model(seed: int = 0) -> HFLM:
    tokenizer = make_tokenizer()
    return HFLM(pretrained=make_model(len(tokenizer), seed).float(), tokenizer=tokenizer, device="cpu", batch_size=4)


def evaluate(folder: Path, task: str, lm: HFLM | None = None, **metadata: Any) -> dict[str, Any]:
    metadata = {"tokenizer": make_tokenizer(), "max_length": 96, "muse_dir": str(folder), **metadata}
    return run(lm or model(), [task], metadata, log_samples=True)


def test_questions_follow_the_few_shot_examples(folder: Path) -> None:
    docs = muse.knowmem("news", "forget", muse_dir=str(folder))["test"]
    rows = tiny_muse.tables("news")
    examples = rows["knowmem/forget_qa_icl"]
    shots = "".join(f"Question: {s['question']}\nAnswer: {s['answer']}\n\n" for s in examples)
    for doc, row in zip(docs, rows["knowmem/forget_qa"], strict=True):
        assert doc["context"] == f"{shots}Question: {row['question']}\nAnswer:"
        assert (doc["target"], doc["most"], doc["stops"]) == (f" {row['answer']}", 32, list(muse.STOP_STRINGS))


@pytest.mark.parametrize("task", ["muse_news_verbmem", "muse_books_knowmem_retain"])
def test_completions_are_scored_by_rouge_without_a_stemmer(folder: Path, task: str) -> None:
    result = evaluate(folder, task)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    values = []
    for sample in result["samples"][task]:
        score = scorer.score(sample["doc"]["target"], sample["resps"][0][0])["rougeL"]
        assert sample["rougel_f1"][0] == pytest.approx(score.fmeasure)
        assert sample["rougel_recall"][0] == pytest.approx(score.recall)
        values.append(score.fmeasure)
    assert metric_values(result, task)["rougel_f1"] == pytest.approx(sum(values) / len(values))


def test_a_true_text_is_cut_to_the_longest_possible_completion() -> None:
    tokenizer, task = make_tokenizer(), object.__new__(muse.CompletionTask)
    task._tokens = Tokens(tokenizer, 96)
    task._metric_fn_list = {}
    task._metric_names = ["rougel_f1"]
    doc = {"target": " Ada Brook was born in Marsh Town", "most": 2, "stops": [], "group": "g"}
    assert task.process_results(doc, ["Ada Brook"])["rougel_f1"] == (1.0, "g")


def test_privleak_against_samples_and_against_a_published_auc(folder: Path, tmp_path: Path) -> None:
    task, other = "muse_news_privleak", model(seed=5)
    first = evaluate(folder, task, other)
    assert str(metric_values(first, task)["priv_leak"]).startswith("n/a: --metadata muse_retain_samples=PATH")
    (tmp_path / f"samples_{task}_1.jsonl").write_text(
        "".join(json.dumps(sample, default=str) + "\n" for sample in first["samples"][task])
    )

    def auc(result: dict[str, Any]) -> float:
        items = [sample["auc_min_k"] for sample in result["samples"][task]]
        return float(roc_auc_score([item[1] == "member" for item in items], [item[0] for item in items]))

    result = evaluate(folder, task, muse_retain_samples=str(tmp_path))
    values = metric_values(result, task)
    assert values["auc_min_k"] == pytest.approx(auc(result))
    assert values["priv_leak"] == pytest.approx(priv_leak(auc(result), auc(first)))
    assert values["priv_leak_low"] <= values["priv_leak"] <= values["priv_leak_high"]
    published = metric_values(evaluate(folder, task, muse_retrained_auc=0.5228), task)
    assert published["priv_leak"] == pytest.approx(priv_leak(auc(result), 0.5228))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda f: muse.verbmem("news", muse_dir="nowhere"),
            r"muse_dir='nowhere': news/verbmem/forget\.json is missing in this directory",
        ),
        (lambda f: muse.privleak("news", "t", muse_dir=str(f), muse_retrained_auc="x"), "muse_retrained_auc='x'"),
        (lambda f: muse.privleak("news", "t", muse_dir=str(f), muse_retrained_auc=1), "from 0 to below 1"),
    ],
)
def test_invalid_arguments(folder: Path, build: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not valid JSON"),
        ('{"a": 1}', "should hold a list"),
        ("[]", "holds no rows"),
        ('[{"prompt": "x"}]', "'gt'"),
    ],
)
def test_invalid_files(tmp_path: Path, content: str, message: str) -> None:
    folder = tiny_muse.write(tmp_path / "muse")
    (folder / "news/verbmem/forget.json").write_text(content)
    with pytest.raises(UserError, match=message):
        muse.verbmem("news", muse_dir=str(folder))


def test_jsonl_files_are_read_too(tmp_path: Path) -> None:
    folder = tiny_muse.write(tmp_path / "muse")
    file = folder / "news/verbmem/forget.json"
    rows = json.loads(file.read_text())
    file.unlink()
    file.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(muse.verbmem("news", muse_dir=str(folder))["test"]) == len(rows)
