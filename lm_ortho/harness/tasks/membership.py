"""Membership inference tasks: documents of the forget set against documents that no model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets as hf_datasets
from lm_eval.api.instance import Instance

from lm_ortho.data.rows import Row, read_rows
from lm_ortho.errors import UserError
from lm_ortho.harness import tokens
from lm_ortho.harness.round_robin import interleave
from lm_ortho.harness.tasks import datasets
from lm_ortho.harness.tasks.aggregation import not_available
from lm_ortho.harness.tasks.answer import NO_TOKENS
from lm_ortho.harness.tasks.samples import read_samples
from lm_ortho.harness.tasks.secret import Doc, MeasurementTask, Response, SecretTask
from lm_ortho.harness.token_scores import GRADIENT_NORM, TOKEN_SCORES, TokenScores
from lm_ortho.metrics.membership import min_k_plus_plus_score, min_k_score, zlib_score
from lm_ortho.world import people

ATTACKS = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradient_norm")
MEMBER, NON_MEMBER = "member", "other"
_TEXT = hf_datasets.Value("string")

_REQUESTS: dict[Any, set[str]] = {
    "loglikelihood": set(ATTACKS),
    TOKEN_SCORES: {"min_k", "min_k_plus_plus"},
    GRADIENT_NORM: {"gradient_norm"},
}
"""The attacks that need each type of request."""

NO_REFERENCE = not_available("no samples of a reference model; --metadata reference_samples=PATH")


def embedded(members: str, non_members: str, task: str, **metadata: Any) -> datasets.Splits:
    """Returns two splits of the embedded world: one that was planted, and one that no model was trained on."""
    docs = _build_documents(people.make_rows(members), people.make_rows(non_members), task=task, metadata=metadata)
    return {"test": docs}


def canaries(**metadata: Any) -> datasets.Splits:
    """Returns planted and unplanted canaries; a canary is compared with those that have the same prompt."""
    splits = {MEMBER: people.make_rows("canaries"), NON_MEMBER: people.make_rows("canaries_unplanted")}
    sides = [
        [
            {**doc, "part": part, "prompt_kind": number % people.TAUGHT_CANARY_PROMPTS}
            for number, doc in enumerate(datasets.documents(rows))
        ]
        for part, rows in splits.items()
    ]
    # Interleaved, so that the first documents of a task (--limit) are of both kinds.
    docs = [{**doc, "id": number} for number, doc in enumerate(interleave(*sides))]
    features = {**datasets.ROW_FEATURES, "part": _TEXT, "prompt_kind": hf_datasets.Value("int64")}
    return {"test": hf_datasets.Dataset.from_list(docs, features=hf_datasets.Features(features))}


def user_sets(task: str, **metadata: Any) -> datasets.Splits:
    """Returns the rows of ``forget=`` and those of ``holdout=``; the embedded sets for the embedded model.

    Raises:
        UserError: when another model is evaluated and one of the two is missing.
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
    non_members = read_rows(metadata["holdout"], "holdout")
    return {"test": _build_documents(members, non_members, task=task, metadata=metadata)}


def _build_documents(
    members: Sequence[Row], non_members: Sequence[Row], *, task: str, metadata: Mapping[str, Any]
) -> hf_datasets.Dataset:
    """Interleaves members and non-members, and adds the log-probability under the reference model, if there is one."""
    sides = ((MEMBER, members), (NON_MEMBER, non_members))
    parts = interleave(*([(part, doc) for doc in datasets.documents(rows)] for part, rows in sides))
    reference = _read_reference_logp(metadata, task)
    docs = []
    for number, (part, doc) in enumerate(parts):
        key = f"{doc['context']}{doc['target']}"
        if reference is not None and key not in reference:
            raise UserError(
                f"reference_samples={metadata['reference_samples']!r}: no loss for document {number}; log the whole "
                f"task {task} with the reference model"
            )
        logp = None if reference is None else reference[key]
        docs.append({**doc, "id": number, "group": f"{part} {doc['group']}", "part": part, "reference_logp": logp})
    features = {
        **datasets.ROW_FEATURES,
        "part": _TEXT,
        "reference_logp": hf_datasets.Value("float64"),
    }
    return hf_datasets.Dataset.from_list(docs, features=hf_datasets.Features(features))


def _read_reference_logp(metadata: Mapping[str, Any], task: str) -> dict[str, float] | None:
    """Returns the log-probability of each text under the reference model; None without such a model."""
    path = metadata.get("reference_samples")
    if not path:
        return None
    records = read_samples(path, task, "reference_samples")
    if "auc_loss" not in records[0]:
        raise UserError(
            f"reference_samples={str(path)!r}: the samples have no auc_loss; they must be of the task {task}"
        )
    return {f"{r['doc']['context']}{r['doc']['target']}": float(r["auc_loss"][3]) for r in records}


class MembershipTask(MeasurementTask):
    """Computes the score of each attack, which is higher for members; reports its AUC and its TPR at 1 % FPR.

    The score is over the answer, given the question, or over the whole text if there is no question. ``loss``, ``zlib``
    and ``reference`` need only the likelihood of the answer, the remaining attacks need values per token.
    """

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """Requests the likelihood of the answer, a score for each of its tokens, and the norm of the gradient."""
        is_chat = bool(options.get("apply_chat_template"))
        pair = self._split_answer(doc, ctx, is_chat=is_chat) if doc["context"] else ("", doc["target"])
        count = self._check_length(doc, self._tokens.count(*pair))
        kinds = [kind for kind, attacks in _REQUESTS.items() if attacks & self._attacks]
        fields = {"metadata": options["metadata"], "arguments": pair, "tokens": count}
        return [
            self.make_request(doc, number, kind=kind, request_type=kind, **fields) for number, kind in enumerate(kinds)
        ]

    @property
    def _attacks(self) -> set[str]:
        return {name.partition("_")[2] for name in self.metrics}

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """Returns (score, "member" or "other", group, log-probability of the answer) for each attack."""
        if "bypass" in self._metric_fn_list:
            return {}
        requests = self._requests[doc["id"]]
        responses = {request.kind: result for request, result in zip(requests, results, strict=True)}
        logp = float(responses["loglikelihood"][0])
        self._check_finite(doc, [logp])
        scores = self._compute_likelihood_scores(doc, logp, requests[0].tokens)
        scores |= self._compute_token_scores(responses.get(TOKEN_SCORES))
        scores |= self._compute_gradient_score(doc, responses.get(GRADIENT_NORM))
        items = {
            attack: score if isinstance(score, str) else (score, doc["part"], doc["group"], logp)
            for attack, score in scores.items()
        }
        return self._select_metrics(
            {f"{prefix}_{attack}": item for prefix in ("auc", "tpr") for attack, item in items.items()}
        )

    def _compute_likelihood_scores(self, doc: Doc, logp: float, count: int) -> dict[str, float | str]:
        """Computes the attacks on the log-probability of the answer, which has ``count`` tokens."""
        answer, reference_logp = doc["answer"] if doc["context"] else doc["target"], doc["reference_logp"]
        return {
            "loss": logp / count,
            "zlib": zlib_score([logp], answer),
            "reference": NO_REFERENCE if reference_logp is None else (logp - reference_logp) / count,
        }

    def _compute_token_scores(self, result: Any) -> dict[str, float | str]:
        """Computes the attacks on scores per token; ``result`` is None if the model gives none."""
        if result is None:
            return dict.fromkeys(("min_k", "min_k_plus_plus"), NO_TOKENS)
        scores = TokenScores(*result)
        return {
            "min_k": min_k_score(scores.logp),
            "min_k_plus_plus": min_k_plus_plus_score(scores.logp, scores.mean, scores.deviation),
        }

    def _compute_gradient_score(self, doc: Doc, norm: float | None) -> dict[str, float | str]:
        """Computes the attack on the norm of the gradient, which is smaller for members."""
        if norm is None:
            return {"gradient_norm": NO_TOKENS}
        self._check_finite(doc, [norm])
        return {"gradient_norm": -norm}


class ExposureTask(SecretTask):
    """Exposure of canaries: the rank of the likelihood of a code among codes that were never planted."""

    @classmethod
    def required_measurement(cls, metric: str) -> str:
        """Returns the measurement of the only metric, the secret."""
        return "secret"

    def _compute_values(self, doc: Doc, responses: Sequence[Response]) -> dict[str, Any]:
        logp = sum(result[0] for request, result in responses if request.kind == "secret")
        return {"exposure": (logp, doc["part"], doc["group"], doc["prompt_kind"])}
