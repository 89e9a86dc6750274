"""Answers measured token by token and as generated text, beside their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from lm_ortho.harness.tasks.aggregation import not_available
from lm_ortho.harness.tasks.secret import Doc, Part, SecretTask
from lm_ortho.harness.token_scores import TOKEN_SCORES, TokenScores
from lm_ortho.metrics.memorisation import exact_memorisation, extraction_strength
from lm_ortho.metrics.rouge import rouge

NO_TOKENS = not_available("the model gives no probability per token")

MOST_TOKENS = 200
"""Generated tokens at most, as the published evaluations of TOFU have it."""


class AnswerTask(SecretTask):
    """A ``SecretTask`` that also asks for a score per token of the answer and for a greedy answer."""

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """The log-likelihood requests, then those that the metrics need beside them."""
        chat = bool(options.get("apply_chat_template"))
        parts: list[Instance] = list(super().construct_requests(doc, ctx, **options))
        wanted = self._needed
        if doc["context"] and "tokens" in wanted:
            context, answer = self._answer(doc, ctx, chat)
            parts.append(self.part(doc, len(parts), "tokens", TOKEN_SCORES, (context, answer), options))
        if doc["context"] and "generated" in wanted:
            most = min(MOST_TOKENS, self._tokens.max_length // 2)
            generation = {"until": [], "do_sample": False, "max_gen_toks": most}
            parts.append(self.part(doc, len(parts), "generated", "generate_until", (ctx, generation), options))
        return parts

    def _values(self, doc: Doc, answered: Sequence[tuple[Part, Any]]) -> dict[str, Any]:
        values, group = super()._values(doc, answered), doc["group"]
        for part, got in answered:
            if part.kind == "generated":
                said = rouge(got.strip(), doc["answer"])
                values |= {
                    "rouge1_recall": (said.rouge1_recall, group),
                    "rougel_recall": (said.rougel_recall, group),
                    "rougel_f1": (said.rougel_f1, group),
                }
            elif part.kind == "tokens":
                values |= self._token_values(doc, None if got is None else TokenScores(*got))
        return values

    def _token_values(self, doc: Doc, scores: TokenScores | None) -> dict[str, Any]:
        """Values that need the score of every token; None where the model gives none."""
        if scores is None:
            return dict.fromkeys(("exact_memorisation", "extraction_strength"), NO_TOKENS)
        return {
            "exact_memorisation": (exact_memorisation(scores.greedy), doc["group"]),
            "extraction_strength": (extraction_strength(scores.greedy), doc["group"]),
        }
