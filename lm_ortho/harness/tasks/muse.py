"""MUSE (Shi et al. 2024, arXiv 2407.06460): verbatim memory, knowledge and privacy of a news and a books corpus.

The data comes from the hub (``muse-bench/MUSE-News``, ``-Books``), or from a directory as MUSE's own scripts write it:
``<corpus>/knowmem/forget_qa.json`` and so on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets as hf_datasets
from lm_eval.api.instance import Instance

from lm_ortho.errors import UserError
from lm_ortho.harness.round_robin import in_turns
from lm_ortho.harness.tasks.aggregation import not_available
from lm_ortho.harness.tasks.answer import NO_TOKENS
from lm_ortho.harness.tasks.membership import MEMBER, OTHER
from lm_ortho.harness.tasks.samples import read_samples
from lm_ortho.harness.tasks.secret import Doc, PartTask
from lm_ortho.harness.tasks.tofu import MIN_K_SHARE
from lm_ortho.harness.token_scores import TOKEN_SCORES, TokenScores
from lm_ortho.hub import first_line
from lm_ortho.metrics.membership import min_k_score
from lm_ortho.metrics.rouge import rouge

CORPORA = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
DIRECTORY_VARIABLE = "LM_ORTHO_MUSE_DIR"
VERBATIM_TOKENS, ANSWER_TOKENS = 128, 32
STOPS = ("\n\n", "\nQuestion", "Question:")

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
    """Beginnings of texts of the forget set, and how they go on."""
    rows = _table(corpus, "verbmem", "forget", ("prompt", "gt"), metadata)
    docs = [_completion(n, row["prompt"].rstrip(), row["gt"], VERBATIM_TOKENS, ()) for n, row in enumerate(rows)]
    return {"test": hf_datasets.Dataset.from_list(docs, features=_COMPLETION)}


def knowmem(corpus: str, split: str, **metadata: Any) -> dict[str, hf_datasets.Dataset]:
    """Questions about the ``split`` (forget or retain) after the examples that MUSE gives."""
    fields = ("question", "answer")
    shots = _table(corpus, "knowmem", f"{split}_qa_icl", fields, metadata)
    before = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
    rows = _table(corpus, "knowmem", f"{split}_qa", fields, metadata)
    docs = [
        _completion(n, f"{before}Question: {row['question']}\nAnswer:", row["answer"], ANSWER_TOKENS, STOPS)
        for n, row in enumerate(rows)
    ]
    return {"test": hf_datasets.Dataset.from_list(docs, features=_COMPLETION)}


def privleak(corpus: str, task: str, **metadata: Any) -> dict[str, hf_datasets.Dataset]:
    """Texts of the forget set and of a hold-out set."""
    auc, logged, why = _retrained(task, metadata)
    sides = ((MEMBER, "forget"), (OTHER, "holdout"))
    texts = in_turns(
        *(
            [(part, row["text"]) for row in _table(corpus, "privleak", split, ("text",), metadata)]
            for part, split in sides
        )
    )
    docs = [
        {
            "id": number,
            "context": "",
            "target": text,
            "group": f"text {number}",
            "part": part,
            "retrained_score": None if logged is None else logged.get(text),
            "retrained_auc": auc,
            "no_score": why,
        }
        for number, (part, text) in enumerate(texts)
    ]
    return {"test": hf_datasets.Dataset.from_list(docs, features=_LEAK)}


def _retrained(task: str, metadata: Mapping[str, Any]) -> tuple[float | None, dict[str, float] | None, str]:
    """(AUC of the retrained model, or its score by text, or why there is neither)."""
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


def _completion(number: int, context: str, target: str, most: int, stops: Sequence[str]) -> dict[str, Any]:
    return {
        "id": number,
        "context": context,
        "target": f" {target.strip()}",
        "group": f"row {number}",
        "most": most,
        "stops": list(stops),
    }


def _table(
    corpus: str, name: str, split: str, fields: tuple[str, ...], metadata: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The rows of one table of MUSE. Raises ``UserError`` for one that is missing or has other fields."""
    folder = metadata.get("muse_dir") or os.environ.get(DIRECTORY_VARIABLE)
    where = f"{corpus}/{name}/{split}"
    rows = _from_directory(str(folder), where) if folder else _from_hub(corpus, name, split)
    if fields == ("text",):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(rows):
        missing = [field for field in fields if not isinstance(row, Mapping) or not isinstance(row.get(field), str)]
        if missing:
            raise UserError(f"muse_dir: {where}, row {number}: no text in the field {missing[0]!r}")
    if not rows:
        raise UserError(f"muse_dir: {where} holds no rows")
    return list(rows)


def _from_directory(folder: str, where: str) -> list[Any]:
    path = Path(folder).expanduser()
    for file in (path / f"{where}.json", path / f"{where}.jsonl"):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            found = (
                json.loads(text) if file.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
            )
        except json.JSONDecodeError as error:
            raise UserError(f"muse_dir: {file} is not valid JSON ({error.msg}, line {error.lineno})") from None
        if not isinstance(found, list):
            raise UserError(f"muse_dir: {file} should hold a list of rows")
        return found
    raise UserError(f"muse_dir={folder!r}: no {where}.json there")


def _from_hub(corpus: str, name: str, split: str) -> list[Any]:
    try:
        return list(hf_datasets.load_dataset(CORPORA[corpus], name, split=split))
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        raise UserError(
            f"{CORPORA[corpus]}, {name}, {split}: could not be loaded from the hub ({first_line(error)}); without a "
            f"network pass --metadata muse_dir=DIR (or set {DIRECTORY_VARIABLE})"
        ) from None


class CompletionTask(PartTask):
    """ROUGE-L of greedy completions, without a stemmer, as MUSE has it."""

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """One generation."""
        generation = {"until": list(doc["stops"]), "do_sample": False, "max_gen_toks": self._most(doc)}
        return [self.part(doc, 0, "generated", "generate_until", (ctx, generation), options)]

    def process_results(self, doc: Doc, results: Sequence[str]) -> dict[str, Any]:
        """ROUGE-L of what was said against as many tokens of the true text as could be said."""
        if "bypass" in self._metric_fn_list:
            return {}
        tokens = self._tokens.encode(doc["target"])[: self._most(doc)] if not doc["stops"] else ()
        true = self._tokens.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else doc["target"]
        said = rouge(results[0], true, stemmer=False)
        return self._listed(
            {"rougel_f1": (said.rougel_f1, doc["group"]), "rougel_recall": (said.rougel_recall, doc["group"])}
        )

    def _most(self, doc: Doc) -> int:
        """Tokens that the model may say: as many as MUSE has, or half of a shorter context."""
        return int(min(doc["most"], self._tokens.max_length // 2))


class PrivLeakTask(PartTask):
    """PrivLeak: the AUC of Min-40% between forget and hold-out texts, against that of a retrained model."""

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """A score for each token of the text, or of its first window."""
        text = self._tokens.windows(doc["target"])[0][1]
        return [self.part(doc, 0, "tokens", TOKEN_SCORES, ("", text), options)]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """The score of the document, and that of the retrained model."""
        if "bypass" in self._metric_fn_list:
            return {}
        if results[0] is None:
            return self._listed({"auc_min_k": NO_TOKENS, "priv_leak": NO_TOKENS})
        score = min_k_score(TokenScores(*results[0]).logp, MIN_K_SHARE)
        leak = (score, doc["retrained_score"], doc["part"], doc["group"], doc["no_score"], doc["retrained_auc"])
        return self._listed({"auc_min_k": (score, doc["part"], doc["group"], score), "priv_leak": leak})
