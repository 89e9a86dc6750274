"""Tasks of the published TOFU: metrics of one set, forget quality against a retain-only model, model utility."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.aggregation import PrivLeakItem
from lm_ortho.harness.tasks.answer import AnswerTask
from lm_ortho.harness.tasks.membership import MEMBER, NON_MEMBER
from lm_ortho.harness.tasks.secret import (
    LEAD,
    Doc,
    MeasurementRequest,
    Response,
    likelihood_losses,
    truth_losses,
)
from lm_ortho.harness.token_scores import TokenScores
from lm_ortho.metrics.likelihood import LOG_MAX
from lm_ortho.metrics.membership import min_k_score
from lm_ortho.metrics.tofu import PARTS, choice_probability

MIN_K_SHARE = 0.4
"""Share of the tokens in the AUC of PrivLeak, as published for MUSE and TOFU."""
ENDS = ("eos", "none")

_MEASUREMENTS = {
    "choice_prob": "truth",
    "forget_truth_ratio": "truth",
    "retain_truth_ratio": "truth",
    "forget_quality": "truth",
    "forget_ks": "truth",
    "priv_leak": "tokens",
}


class TofuTask(AnswerTask):
    """One set of TOFU. Every scored answer ends with the end-of-text token, as in training and in the paper.

    ``--metadata tofu_end=none`` omits that token. Scores per token (extraction strength, exact memorisation, PrivLeak)
    never include it. White space that a chat template writes before the answer (the blank line of Llama 3) belongs to
    the prompt, as in training and in open-unlearning, although lm-eval scores it with the answer.
    """

    def build_all_requests(self, **options: Any) -> None:
        """Reads ``tofu_end``, and builds the requests."""
        end = (self.config.metadata or {}).get("tofu_end", "eos")
        if end not in ENDS:
            raise UserError(f"tofu_end={end!r} is unknown; known: {', '.join(ENDS)}")
        self._scores_end = end == "eos"
        super().build_all_requests(**options)

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Any]:
        """Builds the requests of a document; a held-out document has only the one for scores per token."""
        self._end = (self._tokens.tokenizer.eos_token or "") if self._scores_end else ""
        requests = super().construct_requests(doc, ctx, **options)
        if options.get("apply_chat_template"):
            requests += self._exclude_lead(doc, requests, ctx, metadata=options["metadata"])
        if doc["part"] != "holdout":
            return requests
        token_requests = [request for request in requests if request.kind == "tokens"]
        for number, request in enumerate(token_requests):
            request.idx = number
        return token_requests

    def _exclude_lead(
        self, doc: Doc, requests: Sequence[MeasurementRequest], ctx: str, *, metadata: Any
    ) -> list[MeasurementRequest]:
        """Excludes the white space at the end of the prompt ``ctx`` from what the requests measure.

        Returns the request that measures it alone; none if there is none, or where a token of it is also one of the
        answer.
        """
        pairs = [request.args for request in requests if request.kind != "generated"]
        starts = {context for context, _ in pairs}
        context = starts.pop() if len(starts) == 1 else ctx
        lead = ctx[len(context) :]
        is_separate = all(self._tokens.is_boundary("".join(pair), len(ctx)) for pair in pairs)
        if not lead or not ctx.startswith(context) or not is_separate:
            return []
        count = self._tokens.count(context, lead)
        for request in requests:
            if request.kind != "generated":
                request.lead, request.tokens = count, request.tokens - count
        fields: dict[str, Any] = {"kind": LEAD, "request_type": "loglikelihood", "arguments": (context, lead)}
        return [self.make_request(doc, len(requests), metadata=metadata, tokens=count, **fields)]

    def _request_ingredients(self, chat_template: Callable[..., str] | None) -> dict[str, Any]:
        return super()._request_ingredients(chat_template) | {"scores_end": self._scores_end}

    @classmethod
    def required_measurement(cls, metric: str) -> str:
        """Returns the measurement that a metric is computed from."""
        return _MEASUREMENTS.get(metric) or super().required_measurement(metric)

    def _compute_token_values(self, doc: Doc, scores: TokenScores | None) -> dict[str, Any]:
        is_holdout = doc["part"] == "holdout"
        values = {} if is_holdout else super()._compute_token_values(doc, scores)
        item = PrivLeakItem(
            score=None if scores is None else min_k_score(scores.logp, MIN_K_SHARE),
            retrained_score=doc["retrained_score"],
            part=NON_MEMBER if is_holdout else MEMBER,
            group=doc["group"],
            reason=doc["no_score"],
            retrained_auc=None,
        )
        values["priv_leak"] = tuple(item)
        return values

    def _compute_values(self, doc: Doc, responses: Sequence[Response]) -> dict[str, Any]:
        values, losses = super()._compute_values(doc, responses), likelihood_losses(responses)
        ratio_losses = truth_losses(losses)
        if ratio_losses is None:
            return values
        paraphrased_loss, perturbed_losses = ratio_losses
        log_ratio, group = values["truth_ratio"]
        ratio = math.exp(min(log_ratio, LOG_MAX))
        answer_losses = (loss / request.tokens for request, loss, _ in losses if request.in_answer)
        answer_loss = next(answer_losses, paraphrased_loss)
        return values | {
            "choice_prob": (float(choice_probability([answer_loss], [perturbed_losses])[0]), group),
            "forget_truth_ratio": (math.exp(-abs(log_ratio)), group),
            "retain_truth_ratio": (max(0.0, 1.0 - ratio), group),
            "forget_quality": (log_ratio, doc["retrained_ratio"], group, doc["no_ratio"]),
            "forget_ks": (log_ratio, doc["retrained_ratio"], group, doc["no_ratio"]),
        }


class UtilityTask(TofuTask):
    """Model utility: nine means over three sets, and their harmonic mean."""

    @classmethod
    def required_measurement(cls, metric: str) -> str:
        """Returns the measurement that a metric is computed from: answers, generated answers, or wrong answers."""
        kinds = {"prob": "answer", "rouge": "generated", "truth_ratio": "truth"}
        return next((kind for suffix, kind in kinds.items() if metric.endswith(f"_{suffix}")), "truth")

    def _compute_values(self, doc: Doc, responses: Sequence[Response]) -> dict[str, Any]:
        values = super()._compute_values(doc, responses)
        if "retain_truth_ratio" not in values:
            raise UserError(f"{self.task_name}: document {doc['id']} of {doc['part']} has no perturbed_answer")
        prob = values["prob"] if doc["part"] == "retain" else values["choice_prob"]
        parts = {"prob": prob, "rouge": values["rougel_recall"], "truth_ratio": values["retain_truth_ratio"]}
        set_values = {f"{doc['part']}_{name}": value for name, value in parts.items()}
        numbers = [parts[name][0] for name in PARTS]
        return set_values | {"model_utility": (doc["part"], *numbers, doc["group"])}
