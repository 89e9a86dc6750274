"""Tasks of the published TOFU: the numbers of one set, forget quality against a retain-only model, model utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.answer import AnswerTask
from lm_ortho.harness.tasks.membership import MEMBER, OTHER
from lm_ortho.harness.tasks.secret import Doc, Part, scored_by_likelihood, truth_losses
from lm_ortho.harness.token_scores import TokenScores
from lm_ortho.metrics.likelihood import LOG_MAX
from lm_ortho.metrics.membership import min_k_score
from lm_ortho.metrics.tofu import PARTS, choice_probability

MIN_K_SHARE = 0.4
"""Of the tokens, in the AUC of PrivLeak, as published for MUSE and TOFU."""
ENDS = ("eos", "none")

_NEEDED = {
    "choice_prob": "truth",
    "forget_truth_ratio": "truth",
    "retain_truth_ratio": "truth",
    "forget_quality": "truth",
    "forget_ks": "truth",
    "priv_leak": "tokens",
}


class TofuTask(AnswerTask):
    """One set of TOFU. Every scored answer ends with the end-of-text token, as it was trained and published.

    ``--metadata tofu_end=none`` leaves that token out. Scores per token (extraction strength, exact memorisation,
    PrivLeak) never count it.
    """

    def build_all_requests(self, **options: Any) -> None:
        """Builds the requests, after the end token is known."""
        end = (self.config.metadata or {}).get("tofu_end", "eos")
        if end not in ENDS:
            raise UserError(f"tofu_end={end!r} is unknown; known: {', '.join(ENDS)}")
        self._ends = end == "eos"
        super().build_all_requests(**options)

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Any]:
        """The requests of a document; of a hold-out document only the scores per token."""
        self._end = (self._tokens.tokenizer.eos_token or "") if self._ends else ""
        parts = super().construct_requests(doc, ctx, **options)
        if doc["part"] != "holdout":
            return parts
        kept = [part for part in parts if part.kind == "tokens"]
        for number, part in enumerate(kept):
            part.idx = number
        return kept

    def _request_fingerprint(self) -> str:
        return f"{super()._request_fingerprint()}{'' if self._ends else '-open'}"

    @classmethod
    def needs(cls, metric: str) -> str:
        """What has to be measured for a metric."""
        return _NEEDED.get(metric) or super().needs(metric)

    def _token_values(self, doc: Doc, scores: TokenScores | None) -> dict[str, Any]:
        values = {} if doc["part"] == "holdout" else super()._token_values(doc, scores)
        own = None if scores is None else min_k_score(scores.logp, MIN_K_SHARE)
        part = OTHER if doc["part"] == "holdout" else MEMBER
        values["priv_leak"] = (own, doc["retrained_score"], part, doc["group"], doc["no_score"], None)
        return values

    def _values(self, doc: Doc, answered: Sequence[tuple[Part, Any]]) -> dict[str, Any]:
        values, scored = super()._values(doc, answered), scored_by_likelihood(answered)
        losses = truth_losses(scored)
        if losses is None:
            return values
        log_ratio, group = values["truth_ratio"]
        ratio = math.exp(min(log_ratio, LOG_MAX))
        right = next((loss / part.tokens for part, loss, _ in scored if part.in_answer), losses[0])
        return values | {
            "choice_prob": (float(choice_probability([right], [losses[1]])[0]), group),
            "forget_truth_ratio": (math.exp(-abs(log_ratio)), group),
            "retain_truth_ratio": (max(0.0, 1.0 - ratio), group),
            "forget_quality": (log_ratio, doc["retrained_ratio"], group, doc["no_ratio"]),
            "forget_ks": (log_ratio, doc["retrained_ratio"], group, doc["no_ratio"]),
        }


class UtilityTask(TofuTask):
    """Model utility: nine means over three sets, and the harmonic mean of them."""

    @classmethod
    def needs(cls, metric: str) -> str:
        """What has to be measured: answers, wrong answers and generated ones, for one metric each or for all."""
        kinds = {"prob": "answer", "rouge": "generated", "truth_ratio": "truth"}
        return next((kind for end, kind in kinds.items() if metric.endswith(f"_{end}")), "truth")

    def _values(self, doc: Doc, answered: Sequence[tuple[Part, Any]]) -> dict[str, Any]:
        own = super()._values(doc, answered)
        if "retain_truth_ratio" not in own:
            raise UserError(f"{self.task_name}: document {doc['id']} of {doc['part']} has no perturbed_answer")
        prob = own["prob"] if doc["part"] == "retain" else own["choice_prob"]
        means = {"prob": prob, "rouge": own["rougel_recall"], "truth_ratio": own["retain_truth_ratio"]}
        shown = {f"{doc['part']}_{name}": value for name, value in means.items()}
        numbers = [means[name][0] for name in PARTS]
        return shown | {"model_utility": (doc["part"], *numbers, doc["group"])}
