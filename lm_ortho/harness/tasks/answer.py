"""Tasks that measure answers token by token and as generated text, in addition to their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from lm_ortho.harness.tasks.aggregation import not_available
from lm_ortho.harness.tasks.secret import Doc, Response, SecretTask
from lm_ortho.harness.token_scores import TOKEN_SCORES, TokenScores
from lm_ortho.metrics.memorisation import exact_memorisation, extraction_strength
from lm_ortho.metrics.rouge import rouge

NO_TOKENS = not_available("the model gives no probability per token")

MAX_TOKENS = 200
"""Largest number of generated tokens, as in the published evaluations of TOFU."""


class AnswerTask(SecretTask):
    """A ``SecretTask`` that also requests a score per token of the answer, and a greedy answer."""

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """Builds the log-likelihood requests, then the further ones that the metrics need."""
        requests: list[Instance] = list(super().construct_requests(doc, ctx, **options))
        required, metadata = self._required_measurements, options["metadata"]
        fields: dict[str, Any]
        if doc["context"] and "tokens" in required:
            pair = self._split_answer(doc, ctx, is_chat=bool(options.get("apply_chat_template")))
            self._check_length(doc, self._tokens.count(*pair))
            fields = {"kind": "tokens", "request_type": TOKEN_SCORES, "arguments": pair}
            requests.append(self.make_request(doc, len(requests), metadata=metadata, **fields))
        if doc["context"] and "generated" in required:
            max_tokens = min(MAX_TOKENS, self._tokens.max_length // 2)
            generation = {"until": [], "do_sample": False, "max_gen_toks": max_tokens}
            fields = {"kind": "generated", "request_type": "generate_until", "arguments": (ctx, generation)}
            requests.append(self.make_request(doc, len(requests), metadata=metadata, **fields))
        return requests

    def _compute_values(self, doc: Doc, responses: Sequence[Response]) -> dict[str, Any]:
        values, group = super()._compute_values(doc, responses), doc["group"]
        for request, result in responses:
            if request.kind == "generated":
                scores = rouge(result.strip(), doc["answer"])
                values |= {
                    "rouge1_recall": (scores.rouge1_recall, group),
                    "rougel_recall": (scores.rougel_recall, group),
                    "rougel_f1": (scores.rougel_f1, group),
                }
            elif request.kind == "tokens":
                per_token = None if result is None else TokenScores(*(column[request.lead :] for column in result))
                values |= self._compute_token_values(doc, per_token)
        return values

    def _compute_token_values(self, doc: Doc, scores: TokenScores | None) -> dict[str, Any]:
        """Computes the values that need the score of every token; ``scores`` is None if the model gives none."""
        if scores is None:
            return dict.fromkeys(("exact_memorisation", "extraction_strength"), NO_TOKENS)
        return {
            "exact_memorisation": (exact_memorisation(scores.greedy), doc["group"]),
            "extraction_strength": (extraction_strength(scores.greedy), doc["group"]),
        }
