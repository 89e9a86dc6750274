"""MUSE (Shi et al. 2024, arXiv 2407.06460): verbatim memorisation, knowledge and privacy on news and books.

The data comes from the hub (``muse-bench/MUSE-News``, ``-Books``), or from a directory in the layout of MUSE's own
scripts: ``<corpus>/knowmem/forget_qa.json`` and so on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import datasets as hf_datasets
from lm_eval.api.instance import Instance

from lm_ortho.errors import UserError
from lm_ortho.finetune.loading import find_place
from lm_ortho.harness.round_robin import interleave
from lm_ortho.harness.tasks.aggregation import PrivLeakItem, not_available
from lm_ortho.harness.tasks.answer import NO_TOKENS
from lm_ortho.harness.tasks.membership import MEMBER, NON_MEMBER
from lm_ortho.harness.tasks.samples import read_samples
from lm_ortho.harness.tasks.secret import Doc, MeasurementTask
from lm_ortho.harness.tasks.tofu import MIN_K_SHARE
from lm_ortho.harness.token_scores import TOKEN_SCORES, TokenScores
from lm_ortho.hub import first_line
from lm_ortho.metrics.membership import min_k_score
from lm_ortho.metrics.rouge import rouge

CORPORA = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
DIRECTORY_VARIABLE = "LM_ORTHO_MUSE_DIR"
VERBATIM_TOKENS, ANSWER_TOKENS = 128, 32
STOP_STRINGS = ("\n\n", "\nQuestion", "Question:")

_TEXT = hf_datasets.Value("string")
_COMPLETION = hf_datasets.Features(
    {
        "id": hf_datasets.Value("int64"),
        "context": _TEXT,
        "target": _TEXT,
        "group": _TEXT,
        "most": hf_datasets.Value("int64"),
        "stops": hf_datasets.List(_TEXT),
    }
)
_LEAK = hf_datasets.Features(
    {
        "id": hf_datasets.Value("int64"),
        "context": _TEXT,
        "target": _TEXT,
        "group": _TEXT,
        "part": _TEXT,
        "retrained_score": hf_datasets.Value("float64"),
        "retrained_auc": hf_datasets.Value("float64"),
        "no_score": _TEXT,
    }
)


def verbmem(corpus: str, **metadata: Any) -> dict[str, hf_datasets.Dataset]:
    """Returns beginnings of texts of the forget set, with their continuations."""
    rows = _read_table(f"{corpus}/verbmem/forget", ("prompt", "gt"), metadata)
    docs = [
        _build_document(number, row["prompt"].rstrip(), row["gt"], max_tokens=VERBATIM_TOKENS)
        for number, row in enumerate(rows)
    ]
    return {"test": hf_datasets.Dataset.from_list(docs, features=_COMPLETION)}


def knowmem(corpus: str, split: str, **metadata: Any) -> dict[str, hf_datasets.Dataset]:
    """Returns questions about the ``split`` (forget or retain), after the few-shot examples of MUSE."""
    fields = ("question", "answer")
    examples = _read_table(f"{corpus}/knowmem/{split}_qa_icl", fields, metadata)
    shots = "".join(f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in examples)
    docs = []
    for number, row in enumerate(_read_table(f"{corpus}/knowmem/{split}_qa", fields, metadata)):
        context = f"{shots}Question: {row['question']}\nAnswer:"
        docs.append(
            _build_document(number, context, row["answer"], max_tokens=ANSWER_TOKENS, stop_strings=STOP_STRINGS)
        )
    return {"test": hf_datasets.Dataset.from_list(docs, features=_COMPLETION)}


def privleak(corpus: str, task: str, **metadata: Any) -> dict[str, hf_datasets.Dataset]:
    """Returns texts of the forget set and of a held-out set."""
    auc, scores, reason = _read_retrained(task, metadata)
    sides = []
    for part, split in ((MEMBER, "forget"), (NON_MEMBER, "holdout")):
        rows = _read_table(f"{corpus}/privleak/{split}", ("text",), metadata)
        sides.append([(part, row["text"]) for row in rows])
    docs = [
        {
            "id": number,
            "context": "",
            "target": text,
            "group": f"text {number}",
            "part": part,
            "retrained_score": None if scores is None else scores.get(text),
            "retrained_auc": auc,
            "no_score": reason,
        }
        for number, (part, text) in enumerate(interleave(*sides))
    ]
    return {"test": hf_datasets.Dataset.from_list(docs, features=_LEAK)}


def _read_retrained(task: str, metadata: Mapping[str, Any]) -> tuple[float | None, dict[str, float] | None, str]:
    """Returns (AUC of the retrained model, its score by text, reason if both are missing)."""
    auc, samples = metadata.get("muse_retrained_auc"), metadata.get("muse_retain_samples")
    if samples:
        records = read_samples(samples, task, "muse_retain_samples")
        scores = {r["doc"]["target"]: r["auc_min_k"][0] for r in records if isinstance(r.get("auc_min_k"), list)}
        if not scores:
            raise UserError(f"muse_retain_samples={str(samples)!r}: no auc_min_k in these samples; log the task {task}")
        return None, scores, not_available("a text is not in the samples of the retrained model")
    if auc is None:
        return None, None, not_available("--metadata muse_retain_samples=PATH or muse_retrained_auc=NUMBER")
    try:
        number = float(auc)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 1:
        raise UserError(f"muse_retrained_auc={auc!r}: must be a number from 0 to below 1")
    return number, None, ""


def _build_document(
    number: int, context: str, target: str, *, max_tokens: int, stop_strings: Sequence[str] = ()
) -> dict[str, Any]:
    return {
        "id": number,
        "context": context,
        "target": f" {target.strip()}",
        "group": f"row {number}",
        "most": max_tokens,
        "stops": list(stop_strings),
    }


def _read_table(table: str, fields: tuple[str, ...], metadata: Mapping[str, Any]) -> list[dict[str, str]]:
    """Reads a table of MUSE, ``<corpus>/<configuration>/<split>``.

    Raises:
        UserError: for a table that is missing, or that lacks one of the ``fields``.
    """
    folder = metadata.get("muse_dir") or os.environ.get(DIRECTORY_VARIABLE)
    rows = _read_from_directory(str(folder), table) if folder else _load_from_hub(*table.split("/"))
    if fields == ("text",):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(rows):
        missing = [field for field in fields if not isinstance(row, Mapping) or not isinstance(row.get(field), str)]
        if missing:
            raise UserError(f"muse_dir: {table}, row {number}: no text in the field {missing[0]!r}")
    if not rows:
        raise UserError(f"muse_dir: {table} holds no rows")
    return list(rows)


def _read_from_directory(folder: str, table: str) -> list[Any]:
    path = find_place(folder, "muse_dir")
    for file in (path / f"{table}.json", path / f"{table}.jsonl"):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
            if file.suffix == ".json":
                rows = json.loads(text)
            else:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (OSError, ValueError, RecursionError) as error:
            reason = (
                f"{error.msg}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
            )
            raise UserError(f"muse_dir: {file} is not valid JSON in UTF-8 ({reason})") from None
        if not isinstance(rows, list):
            raise UserError(f"muse_dir: {file} should hold a list of rows")
        return rows
    raise UserError(f"muse_dir={folder!r}: {table}.json is missing in this directory")


def _load_from_hub(corpus: str, name: str, split: str) -> list[Any]:
    try:
        return list(hf_datasets.load_dataset(CORPORA[corpus], name, split=split))
    except Exception as error:  # the hub client raises many kinds of exceptions; the user needs one line
        raise UserError(
            f"{CORPORA[corpus]}, {name}, {split}: could not be loaded from the hub ({first_line(error)}); without a "
            f"network pass --metadata muse_dir=DIR (or set {DIRECTORY_VARIABLE})"
        ) from None


class CompletionTask(MeasurementTask):
    """ROUGE-L of greedy completions, without a stemmer, as in MUSE."""

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """Requests one generation."""
        generation = {"until": list(doc["stops"]), "do_sample": False, "max_gen_toks": self._max_tokens(doc)}
        fields = {"kind": "generated", "request_type": "generate_until", "arguments": (ctx, generation)}
        return [self.make_request(doc, 0, metadata=options["metadata"], **fields)]

    def process_results(self, doc: Doc, results: Sequence[str]) -> dict[str, Any]:
        """Returns ROUGE-L of the completion against the true text, cut to the length of the longest completion."""
        if "bypass" in self._metric_fn_list:
            return {}
        tokens = self._tokens.encode(doc["target"])[: self._max_tokens(doc)] if not doc["stops"] else ()
        true_text = self._tokens.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else doc["target"]
        scores = rouge(results[0], true_text, stemmer=False)
        return self._select_metrics(
            {"rougel_f1": (scores.rougel_f1, doc["group"]), "rougel_recall": (scores.rougel_recall, doc["group"])}
        )

    def _max_tokens(self, doc: Doc) -> int:
        """Returns the largest number of generated tokens: that of MUSE, or half of a shorter context length."""
        return int(min(doc["most"], self._tokens.max_length // 2))


class PrivLeakTask(MeasurementTask):
    """PrivLeak: the AUC of Min-40% between forget and held-out texts, compared with that of a retrained model."""

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """Requests a score for each token of the text, or of its first window."""
        text = self._tokens.split_into_windows(doc["target"])[0][1]
        fields = {"kind": "tokens", "request_type": TOKEN_SCORES, "arguments": ("", text)}
        return [self.make_request(doc, 0, metadata=options["metadata"], **fields)]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """Returns the score of the document, and that of the retrained model."""
        if "bypass" in self._metric_fn_list:
            return {}
        if results[0] is None:
            return self._select_metrics({"auc_min_k": NO_TOKENS, "priv_leak": NO_TOKENS})
        score = min_k_score(TokenScores(*results[0]).logp, MIN_K_SHARE)
        leak = PrivLeakItem(
            score=score,
            retrained_score=doc["retrained_score"],
            part=doc["part"],
            group=doc["group"],
            reason=doc["no_score"],
            retrained_auc=doc["retrained_auc"],
        )
        return self._select_metrics({"auc_min_k": (score, doc["part"], doc["group"], score), "priv_leak": tuple(leak)})
