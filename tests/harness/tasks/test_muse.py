"""MUSE as tasks, on a directory in its schema."""

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
from tests.support.harness import make_model, make_tokenizer, measured, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_muse.write(tmp_path_factory.mktemp("data") / "muse")


def model(seed: int = 0) -> HFLM:
    tokenizer = make_tokenizer()
    return HFLM(pretrained=make_model(len(tokenizer), seed).float(), tokenizer=tokenizer, device="cpu", batch_size=4)


def asked(folder: Path, task: str, lm: HFLM | None = None, **metadata: Any) -> dict[str, Any]:
    given = {"tokenizer": make_tokenizer(), "max_length": 96, "muse_dir": str(folder), **metadata}
    return run(lm or model(), [task], given, log_samples=True)


def test_questions_come_after_the_examples(folder: Path) -> None:
    docs = muse.knowmem("news", "forget", muse_dir=str(folder))["test"]
    rows = tiny_muse.tables("news")
    shots = rows["knowmem/forget_qa_icl"]
    before = "".join(f"Question: {s['question']}\nAnswer: {s['answer']}\n\n" for s in shots)
    for doc, row in zip(docs, rows["knowmem/forget_qa"], strict=True):
        assert doc["context"] == f"{before}Question: {row['question']}\nAnswer:"
        assert (doc["target"], doc["most"], doc["stops"]) == (f" {row['answer']}", 32, list(muse.STOPS))


@pytest.mark.parametrize("task", ["muse_news_verbmem", "muse_books_knowmem_retain"])
def test_completions_are_scored_by_rouge_without_a_stemmer(folder: Path, task: str) -> None:
    result = asked(folder, task)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    values = []
    for sample in result["samples"][task]:
        score = scorer.score(sample["doc"]["target"], sample["resps"][0][0])["rougeL"]
        assert sample["rougel_f1"][0] == pytest.approx(score.fmeasure)
        assert sample["rougel_recall"][0] == pytest.approx(score.recall)
        values.append(score.fmeasure)
    assert measured(result, task)["rougel_f1"] == pytest.approx(sum(values) / len(values))


def test_a_true_text_is_cut_to_what_could_be_said() -> None:
    tokenizer, task = make_tokenizer(), object.__new__(muse.CompletionTask)
    task._tokens = Tokens(tokenizer, 96)
    task._metric_fn_list = {}
    task._config = type("Config", (), {"metric_list": [{"metric": "rougel_f1"}]})()
    doc = {"target": " Ada Brook was born in Marsh Town", "most": 2, "stops": [], "group": "g"}
    assert task.process_results(doc, ["Ada Brook"])["rougel_f1"] == (1.0, "g")


def test_privleak_against_samples_and_against_a_published_auc(folder: Path, tmp_path: Path) -> None:
    task, other = "muse_news_privleak", model(seed=5)
    first = asked(folder, task, other)
    assert measured(first, task)["priv_leak"].startswith("n/a: --metadata muse_retain_samples=PATH")
    (tmp_path / f"samples_{task}_1.jsonl").write_text(
        "".join(json.dumps(sample, default=str) + "\n" for sample in first["samples"][task])
    )

    def auc(result: dict[str, Any]) -> float:
        items = [sample["auc_min_k"] for sample in result["samples"][task]]
        return float(roc_auc_score([item[1] == "member" for item in items], [item[0] for item in items]))

    result = asked(folder, task, muse_retain_samples=str(tmp_path))
    found = measured(result, task)
    assert found["auc_min_k"] == pytest.approx(auc(result))
    assert found["priv_leak"] == pytest.approx(priv_leak(auc(result), auc(first)))
    assert found["priv_leak_low"] <= found["priv_leak"] <= found["priv_leak_high"]
    published = measured(asked(folder, task, muse_retrained_auc=0.5228), task)
    assert published["priv_leak"] == pytest.approx(priv_leak(auc(result), 0.5228))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: muse.verbmem("news", muse_dir="nowhere"), r"muse_dir='nowhere': no news/verbmem/forget\.json there"),
        (lambda f: muse.privleak("news", "t", muse_dir=str(f), muse_retrained_auc="x"), "muse_retrained_auc='x'"),
        (lambda f: muse.privleak("news", "t", muse_dir=str(f), muse_retrained_auc=1), "from 0 to below 1"),
    ],
)
def test_bad_arguments(folder: Path, make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "is not valid JSON"),
        ('{"a": 1}', "should hold a list"),
        ("[]", "holds no rows"),
        ('[{"prompt": "x"}]', "'gt'"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, said: str) -> None:
    folder = tiny_muse.write(tmp_path / "muse")
    (folder / "news/verbmem/forget.json").write_text(content)
    with pytest.raises(UserError, match=said):
        muse.verbmem("news", muse_dir=str(folder))


def test_lines_of_json_are_read_too(tmp_path: Path) -> None:
    folder = tiny_muse.write(tmp_path / "muse")
    file = folder / "news/verbmem/forget.json"
    rows = json.loads(file.read_text())
    file.unlink()
    file.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(muse.verbmem("news", muse_dir=str(folder))["test"]) == len(rows)
