"""Membership inference as a task: documents of the forget set among documents nobody was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets as hf_datasets
from lm_eval.api.instance import Instance

from lm_ortho.data.rows import Row, read_rows
from lm_ortho.errors import UserError
from lm_ortho.harness import tokens
from lm_ortho.harness.round_robin import in_turns
from lm_ortho.harness.tasks import datasets
from lm_ortho.harness.tasks.aggregation import not_available
from lm_ortho.harness.tasks.answer import NO_TOKENS
from lm_ortho.harness.tasks.samples import read_samples
from lm_ortho.harness.tasks.secret import Doc, Part, PartTask, SecretTask
from lm_ortho.harness.token_scores import GRADIENT_NORM, TOKEN_SCORES, TokenScores
from lm_ortho.metrics.membership import min_k_plus_plus_score, min_k_score, zlib_score
from lm_ortho.world import people

ATTACKS = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradient_norm")
MEMBER, OTHER = "member", "other"
_TEXT = hf_datasets.Value("string")

_REQUESTS: dict[Any, set[str]] = {
    "loglikelihood": set(ATTACKS),
    TOKEN_SCORES: {"min_k", "min_k_plus_plus"},
    GRADIENT_NORM: {"gradient_norm"},
}
"""Which request which attacks need."""

NO_REFERENCE = not_available("no samples of a reference model; --metadata reference_samples=PATH")


def embedded(members: str, others: str, task: str, **metadata: Any) -> datasets.Splits:
    """Two splits of the embedded world: one that was planted, one that no model was ever shown."""
    return {"test": _documents(people.rows(members), people.rows(others), task, metadata)}


def canaries(**metadata: Any) -> datasets.Splits:
    """Planted canaries among those never planted; a canary is compared with the same kind of prompt."""
    splits = {MEMBER: people.rows("canaries"), OTHER: people.rows("canaries_unplanted")}
    # In turns, so that the first documents of a task (--limit) are of both kinds.
    docs = list(
        in_turns(
            *(
                [
                    {**doc, "part": part, "prompt_kind": number % people.CANARY_TAUGHT}
                    for number, doc in enumerate(datasets.documents(rows))
                ]
                for part, rows in splits.items()
            )
        )
    )
    for number, doc in enumerate(docs):
        doc["id"] = number
    features = {**datasets.ROW_FEATURES, "part": _TEXT, "prompt_kind": hf_datasets.Value("int64")}
    return {"test": hf_datasets.Dataset.from_list(docs, features=hf_datasets.Features(features))}


def user_sets(task: str, **metadata: Any) -> datasets.Splits:
    """The rows of ``forget=`` among those of ``holdout=``; the embedded ones for the embedded model.

    Raises:
        UserError: when another model is measured and one of the two is missing.
    """
    members = datasets.user_rows("forget", metadata)
    if not metadata.get("holdout"):
        lm = tokens.newest_model()
        if metadata.get("pretrained") or metadata.get("forget") or (lm is not None and lm.pretrained_argument):
            raise UserError(
                "holdout: membership_set needs rows that the model was not trained on, of the same kind as the forget "
                "set: pass --metadata holdout=rows.jsonl"
            )
        return embedded("forget", "unseen", task, **metadata)
    return {"test": _documents(members, read_rows(metadata["holdout"], "holdout"), task, metadata)}


def _documents(
    members: Sequence[Row], others: Sequence[Row], task: str, metadata: Mapping[str, Any]
) -> hf_datasets.Dataset:
    sides = ((MEMBER, members), (OTHER, others))
    parts = in_turns(*([(part, doc) for doc in datasets.documents(rows)] for part, rows in sides))
    known = _reference_losses(metadata, task)
    docs = []
    for number, (part, doc) in enumerate(parts):
        key = f"{doc['context']}{doc['target']}"
        if known is not None and key not in known:
            raise UserError(
                f"reference_samples={metadata['reference_samples']!r}: no loss for {key[:60]!r}; log the whole task "
                f"{task} with the reference model"
            )
        loss = None if known is None else known[key]
        docs.append({**doc, "id": number, "group": f"{part} {doc['group']}", "part": part, "reference_logp": loss})
    features = {
        **datasets.ROW_FEATURES,
        "part": _TEXT,
        "reference_logp": hf_datasets.Value("float64"),
    }
    return hf_datasets.Dataset.from_list(docs, features=hf_datasets.Features(features))


def _reference_losses(metadata: Mapping[str, Any], task: str) -> dict[str, float] | None:
    """Log-probability of each document under the reference model, by its text; None without such a model."""
    path = metadata.get("reference_samples")
    if not path:
        return None
    records = read_samples(path, task, "reference_samples")
    if "auc_loss" not in records[0]:
        raise UserError(
            f"reference_samples={str(path)!r}: the samples have no auc_loss; they must be of the task {task}"
        )
    return {f"{r['doc']['context']}{r['doc']['target']}": float(r["auc_loss"][3]) for r in records}


class MembershipTask(PartTask):
    """Scores that are higher for members, by attack; the table has the AUC and the TPR at 1 % FPR of each.

    The score is over the answer, given the question; over the whole text where there is no question. ``loss``, ``zlib``
    and ``reference`` need the likelihood of the answer only, the others more than sums.
    """

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """The likelihood of the answer, a score for each of its tokens, and the norm of the gradient."""
        chat = bool(options.get("apply_chat_template"))
        pair = self._answer(doc, ctx, chat) if doc["context"] else ("", doc["target"])
        count = self._tokens.count(*pair)
        if count > self._tokens.max_length:
            raise UserError(
                f"{self.task_name}: document {doc['id']} has {count} tokens, the model takes {self._tokens.max_length}"
            )
        kinds = [kind for kind, attacks in _REQUESTS.items() if attacks & self._attacks]
        return [self.part(doc, number, kind, kind, pair, options, tokens=count) for number, kind in enumerate(kinds)]

    @property
    def _attacks(self) -> set[str]:
        return {name.partition("_")[2] for name in self.metrics}

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """(score, member or other, group, log-probability of the answer) for each attack."""
        if "bypass" in self._metric_fn_list:
            return {}
        parts = self._parts[doc["id"]]
        answers = {part.kind: got for part, got in zip(parts, results, strict=True)}
        logp = float(answers["loglikelihood"][0])
        self._finite(doc, [logp])
        values = self._scores(doc, logp, parts[0].tokens, answers.get(TOKEN_SCORES), answers.get(GRADIENT_NORM))
        items = {
            name: value if isinstance(value, str) else (value, doc["part"], doc["group"], logp)
            for name, value in values.items()
        }
        return self._listed({f"{kind}_{name}": item for kind in ("auc", "tpr") for name, item in items.items()})

    def _scores(self, doc: Doc, logp: float, count: int, scores: Any, gradient: float | None) -> dict[str, float | str]:
        answer, known = doc["answer"] if doc["context"] else doc["target"], doc["reference_logp"]
        found: dict[str, float | str] = dict.fromkeys(ATTACKS, NO_TOKENS)
        found["loss"] = logp / count
        found["zlib"] = zlib_score([logp], answer)
        found["reference"] = NO_REFERENCE if known is None else (logp - known) / count
        if scores is not None:
            each = TokenScores(*scores)
            found["min_k"] = min_k_score(each.logp)
            found["min_k_plus_plus"] = min_k_plus_plus_score(each.logp, each.mean, each.deviation)
        if gradient is not None:
            self._finite(doc, [gradient])
            found["gradient_norm"] = -gradient
        return found


class ExposureTask(SecretTask):
    """Exposure of canaries: the rank of the code's likelihood among codes that were never planted."""

    @classmethod
    def needs(cls, metric: str) -> str:
        """The secret alone."""
        return "secret"

    def _values(self, doc: Doc, answered: Sequence[tuple[Part, Any]]) -> dict[str, Any]:
        logp = sum(got[0] for part, got in answered if part.kind == "secret")
        return {"exposure": (logp, doc["part"], doc["group"], doc["prompt_kind"])}
