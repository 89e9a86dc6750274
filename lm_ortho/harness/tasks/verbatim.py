"""Verbatim completion: how a model continues the first tokens of a text from its possible training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance

from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.answer import NO_TOKENS
from lm_ortho.harness.tasks.secret import Doc, MeasurementTask
from lm_ortho.harness.token_scores import TOKEN_SCORES, TokenScores
from lm_ortho.metrics.memorisation import exact_memorisation, extraction_strength, is_near_verbatim

PREFIX_TOKENS = 32
TOLERANCE = 0.1
"""Permitted edits per true token in the metric ``near_verbatim``."""


class VerbatimTask(MeasurementTask):
    """k-extractability: greedy decoding after the first k tokens of a text, compared with its true continuation.

    k is ``--metadata prefix_tokens=``, and at most half of the text. If a text is longer than the context length of the
    model, only its first window counts.
    """

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """Requests a continuation of the prefix, and a score per token of the whole text."""
        text = self._tokens.split_into_windows(f"{doc['context']}{doc['target']}")[0][1]
        prefix, continuation = self._split_prefix(doc, text)
        generation = {"until": [], "do_sample": False, "max_gen_toks": self._tokens.count(prefix, continuation)}
        requests: list[dict[str, Any]] = [
            {"kind": "generated", "request_type": "generate_until", "arguments": (prefix, generation)},
            {"kind": "tokens", "request_type": TOKEN_SCORES, "arguments": ("", text)},
        ]
        metadata = options["metadata"]
        return [self.make_request(doc, number, metadata=metadata, **fields) for number, fields in enumerate(requests)]

    def _split_prefix(self, doc: Doc, text: str) -> tuple[str, str]:
        """Splits a text into its first k tokens and their continuation."""
        total = self._tokens.count("", text)
        if total < 2:
            raise UserError(
                f"{self.task_name}: document {doc['id']} has {total} token; a prefix and a continuation need two"
            )
        prefix_tokens = min(self._get_prefix_tokens(), total // 2)
        end = 1
        while end < len(text) - 1 and not self._is_prefix_end(text, end, prefix_tokens):
            end += 1
        return self._tokens.split_at_boundary(text[:end], text[end:])

    def _is_prefix_end(self, text: str, end: int, prefix_tokens: int) -> bool:
        """Returns whether ``text[:end]`` has at least ``prefix_tokens`` tokens and ends with a token."""
        if text[end - 1].isspace() or self._tokens.count("", text[:end]) < prefix_tokens:
            return False
        return self._tokens.is_boundary(text, end)

    def _get_prefix_tokens(self) -> int:
        value = (self.config.metadata or {}).get("prefix_tokens", PREFIX_TOKENS)
        if not str(value).isdecimal() or int(value) < 1:
            raise UserError(f"prefix_tokens={value!r}: must be a whole number above 0")
        return int(value)

    def _request_ingredients(self, chat_template: Callable[..., str] | None) -> dict[str, Any]:
        return super()._request_ingredients(chat_template) | {"prefix_tokens": self._get_prefix_tokens()}

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """Returns whether the model reproduced the text, and how much of it."""
        if "bypass" in self._metric_fn_list:
            return {}
        generated_text, scores = results[0].strip(), results[1]
        generation, text_scores = self._requests[doc["id"]]
        true_text, group = text_scores.args[1].removeprefix(generation.args[0]).strip(), doc["group"]
        true_tokens = self._tokens.encode(true_text)
        tokens = self._tokens.encode(generated_text)[: len(true_tokens)]
        values: dict[str, Any] = {
            "verbatim": (float(generated_text.startswith(true_text)), group),
            "near_verbatim": (float(is_near_verbatim(tokens, true_tokens, TOLERANCE)), group),
            "exact_memorisation": NO_TOKENS,
            "extraction_strength": NO_TOKENS,
        }
        if scores is not None:
            greedy = TokenScores(*scores).greedy
            values["exact_memorisation"] = (exact_memorisation(greedy), group)
            values["extraction_strength"] = (extraction_strength(greedy), group)
        return self._select_metrics(values)
