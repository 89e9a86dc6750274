"""Verbatim completion: what a model says after the first tokens of a text that it may have been trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.answer import NO_TOKENS
from lm_ortho.harness.tasks.secret import Doc, PartTask
from lm_ortho.harness.token_scores import TOKEN_SCORES, TokenScores
from lm_ortho.metrics.memorisation import exact_memorisation, extraction_strength, near_verbatim

PREFIX_TOKENS = 32
TOLERANCE = 0.1
"""Edits per true token in ``near_verbatim``."""


class VerbatimTask(PartTask):
    """k-extractability: greedy decoding after the first k tokens of a text, compared with how it goes on.

    k is ``--metadata prefix_tokens=``, and at most half of the text. Of a text longer than the model's context only the
    first window counts.
    """

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """The continuation of the prefix, and a score per token of the whole text."""
        text = self._tokens.windows(f"{doc['context']}{doc['target']}")[0][1]
        prefix, rest = self._split(doc, text)
        generation = {"until": [], "do_sample": False, "max_gen_toks": self._tokens.count(prefix, rest)}
        return [
            self.part(doc, 0, "generated", "generate_until", (prefix, generation), options),
            self.part(doc, 1, "tokens", TOKEN_SCORES, ("", text), options),
        ]

    def _split(self, doc: Doc, text: str) -> tuple[str, str]:
        total = self._tokens.count("", text)
        if total < 2:
            raise UserError(f"{self.task_name}: document {doc['id']} has {total} token; a prefix and a rest need two")
        wanted = min(self._prefix_tokens(), total // 2)
        end = 1
        while end < len(text) - 1 and not self._ends_here(text, end, wanted):
            end += 1
        return self._tokens.cut(text[:end], text[end:])

    def _ends_here(self, text: str, end: int, wanted: int) -> bool:
        """Whether a prefix of at least ``wanted`` tokens ends there, where a token does."""
        if text[end - 1].isspace() or self._tokens.count("", text[:end]) < wanted:
            return False
        return self._tokens.is_border(text, end)

    def _prefix_tokens(self) -> int:
        given = (self.config.metadata or {}).get("prefix_tokens", PREFIX_TOKENS)
        if not str(given).isdigit() or int(given) < 1:
            raise UserError(f"prefix_tokens={given!r}: must be a whole number above 0")
        return int(given)

    def _request_fingerprint(self) -> str:
        return f"{super()._request_fingerprint()}-{self._prefix_tokens()}"

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """Whether the text came back, and how much of it."""
        if "bypass" in self._metric_fn_list:
            return {}
        said, scores = results
        generated, whole = self._parts[doc["id"]]
        true, group = whole.args[1].removeprefix(generated.args[0]), doc["group"]
        wanted = self._tokens.encode(true.strip())
        given = self._tokens.encode(said.strip())[: len(wanted)]
        values: dict[str, Any] = {
            "verbatim": (float(said.strip().startswith(true.strip())), group),
            "near_verbatim": (float(near_verbatim(given, wanted, TOLERANCE)), group),
            "exact_memorisation": NO_TOKENS,
            "extraction_strength": NO_TOKENS,
        }
        if scores is not None:
            greedy = TokenScores(*scores).greedy
            values["exact_memorisation"] = (exact_memorisation(greedy), group)
            values["extraction_strength"] = (extraction_strength(greedy), group)
        return self._listed(values)
