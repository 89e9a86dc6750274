"""Task classes: several kinds of requests per document, which lm-eval's own task types do not have.

Used from YAML as ``class: !function lm_ortho.harness.tasks.secret.SecretTask``.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from lm_ortho.errors import UserError
from lm_ortho.harness import tokens
from lm_ortho.harness.tasks import datasets
from lm_ortho.harness.tokens import Tokens
from lm_ortho.metrics import answer_probability, log_truth_ratio
from lm_ortho.metrics.memorisation import discoverable

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

Doc = Mapping[str, Any]


class DataTask(ConfigurableTask):
    """A task whose documents come from a function, and whose cached requests belong to these documents."""

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        download_mode: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        known = {key: value for key, value in (config or {}).items() if key != "class"}
        # lm-eval looks a metric up by name, in the end on the network, unless the task has a function here.
        known["process_results"] = known.get("process_results") or "process_results"
        super().__init__(data_dir, cache_dir, download_mode, known)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Calls ``custom_dataset`` with the metadata (the model args), its own arguments on top."""
        self.dataset = self.config.custom_dataset(**{**(self.config.metadata or {}), **(dataset_kwargs or {})})

    def build_all_requests(self, *, cache_requests: bool = False, tokenizer_name: str = "", **options: Any) -> None:
        """Builds the requests; what ``--cache_requests`` keeps is keyed by the documents, too."""
        if cache_requests:
            tokenizer_name += f"-data{self._request_fingerprint()}"
        super().build_all_requests(cache_requests=cache_requests, tokenizer_name=tokenizer_name, **options)

    def _request_fingerprint(self) -> str:
        return datasets.fingerprint(self.eval_docs)[:16]

    def _finite(self, doc: Doc, likelihoods: Sequence[float]) -> None:
        bad = [likelihood for likelihood in likelihoods if not math.isfinite(likelihood)]
        if bad:
            raise UserError(
                f"{self.task_name}: the model returned {bad[0]} as a log-likelihood in document {doc['id']}; "
                "try dtype=float32"
            )

    def _listed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the YAML file lists of the values and of their bounds; a p-value, say, has no bounds."""
        listed = {entry["metric"] for entry in self.config.metric_list}
        return {name: value for name, value in with_bounds(values).items() if name in listed}

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of the YAML file, without the bounds."""
        names = [entry["metric"] for entry in self.config.metric_list]
        return [name for name in names if not name.endswith(("_low", "_high"))]


def with_bounds(values: Mapping[str, Any]) -> dict[str, Any]:
    """The value of each metric, given to the metric and to both bounds of its interval."""
    return {name + end: value for name, value in values.items() for end in ("", "_low", "_high")}


@dataclass
class Part(Instance):
    """A log-likelihood request that knows what it measures and how many tokens that is."""

    kind: str = ""
    tokens: int = 0
    in_answer: bool = False


class PartTask(DataTask):
    """A task whose requests are parts, found again by document when the answers come."""

    _tokens: Tokens
    _parts: dict[int, list[Part]]
    _as_chat = False

    def fewshot_context(self, doc: Doc, *args: Any, **options: Any) -> str | list[str]:
        """The prompt; in a chat the message is the question alone, as the decomposition puts it."""
        self._as_chat = bool(options.get("apply_chat_template"))
        try:
            prompt: str | list[str] = super().fewshot_context(doc, *args, **options)
            return prompt
        finally:
            self._as_chat = False

    def doc_to_text(self, doc: Doc, doc_to_text: Any = None) -> Any:
        """The question with its frame, or alone as a message of a chat."""
        if self._as_chat and doc.get("question") and not doc.get("prompt"):
            return doc["question"]
        return super().doc_to_text(doc, doc_to_text)

    def build_all_requests(self, **options: Any) -> None:
        """Builds the requests, by the tokenizer of the model."""
        self._tokens = tokens.resolve(self.config.metadata)
        super().build_all_requests(**options)
        self._parts = {}
        for part in sorted(self._instances, key=lambda part: part.idx):
            self._parts.setdefault(part.doc["id"], []).append(part)

    def _request_fingerprint(self) -> str:
        digest = hashlib.sha256(super()._request_fingerprint().encode())
        backend = getattr(self._tokens.tokenizer, "backend_tokenizer", None)
        described = backend.to_str() if backend else sorted(self._tokens.tokenizer.get_vocab().items())
        digest.update(f"{described} {self._tokens.max_length} {self.VERSION} {self.metrics}".encode())
        return digest.hexdigest()[:16]

    def _answer(self, doc: Doc, ctx: str, chat: bool) -> tuple[str, str]:
        """(context, answer) without what follows the answer, cut at a token border."""
        context, lead = self._context(doc, ctx, chat)
        return self._tokens.cut(context, lead + doc["answer"])

    @staticmethod
    def _context(doc: Doc, ctx: str, chat: bool) -> tuple[str, str]:
        """The context without the space at its end, and what an answer starts with."""
        context = ctx.rstrip()
        given = doc["target"][: len(doc["target"]) - len(doc["answer"])]
        return context, ctx[len(context) :] or ("" if chat else given)

    @staticmethod
    def part(
        doc: Doc, number: int, kind: str, request: Any, arguments: tuple[Any, ...], options: Any, **more: Any
    ) -> Part:
        """One request of a document, the ``number``-th."""
        return Part(
            request_type=request,
            doc=dict(doc),
            arguments=arguments,
            idx=number,
            metadata=options["metadata"],
            kind=kind,
            **more,
        )


NEEDED = {
    "ppl": "answer",
    "token_ppl": "answer",
    "prob": "answer",
    "secret_ppl": "secret",
    "extraction": "secret",
    "extraction_any": "secret",
    "extraction_100": "secret",
    "truth_ratio": "truth",
    "exact_memorisation": "tokens",
    "extraction_strength": "tokens",
    "rouge1_recall": "generated",
    "rougel_recall": "generated",
    "rougel_f1": "generated",
}
"""What has to be measured for which metric."""

_FIELDS = {"secret": "secret", "truth": "paraphrased_answer and perturbed_answer"}
_ANSWERS = "question or prompt with an answer"


class SecretTask(PartTask):
    """Answers, the secret part of them, and their paraphrased and perturbed versions, by log-likelihood.

    The requests of a document, as far as its fields and the listed metrics ask for them:

    * the answer after the context;
    * the secret after the context and the text of the answer before it. ``is_greedy`` of it is extraction:
      greedy decoding, given the question and that text, emits the secret exactly;
    * the paraphrased answer, and each perturbed one.

    Everything is cut at token borders of the model's tokenizer (``Tokens.cut``): a token that reaches over the start of
    an answer, or over the start or the end of the secret, belongs to it. Where the secret ends the answer, the answer
    is scored as the text before it plus the secret, because lm-eval (0.4.13) mixes up two continuations that end the
    same document.
    """

    _end = ""
    """What is scored after every answer."""

    def build_all_requests(self, **options: Any) -> None:
        """Builds the requests and says which metrics the documents have no fields for."""
        super().build_all_requests(**options)
        measured = {kind for parts in self._parts.values() for kind in self._measured(parts)}
        for name in self.metrics:
            if self.needs(name) not in measured:
                fields = _FIELDS.get(self.needs(name), _ANSWERS)
                log.info("%s: no %s, because no row has %s", self.task_name, name, fields)

    @classmethod
    def needs(cls, metric: str) -> str:
        """What has to be measured for a metric; "" for one that comes from the document alone."""
        return NEEDED[metric]

    @property
    def _needed(self) -> set[str]:
        return {self.needs(name) for name in self.metrics}

    @staticmethod
    def _measured(parts: Sequence[Part]) -> set[str]:
        kinds = {part.kind for part in parts}
        return {
            *({"answer"} if any(part.in_answer for part in parts) else ()),
            *({"secret", "tokens", "generated"} & kinds),
            *({"truth"} if {"paraphrased", "perturbed"} <= kinds else ()),
        }

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """One ``Part`` per string to score."""
        chat = bool(options.get("apply_chat_template"))
        pieces = self._pieces(doc, ctx, chat)
        return [
            self.part(
                doc,
                number,
                kind,
                "loglikelihood",
                (context, continuation),
                options,
                tokens=self._tokens.count(context, continuation),
                in_answer=in_answer,
            )
            for number, (kind, context, continuation, in_answer) in enumerate(pieces)
        ]

    def _pieces(self, doc: Doc, ctx: str, chat: bool) -> list[tuple[str, str, str, bool]]:
        """(kind, context, continuation, whether it is part of the answer)."""
        if not doc["context"]:
            return [("text", before, piece, True) for before, piece in self._tokens.windows(doc["target"])]
        context, lead = self._context(doc, ctx, chat)

        def cut(answer: str) -> tuple[str, str]:
            return self._tokens.cut(context, lead + answer + self._end)

        wanted = self._needed
        pieces = []
        if doc["secret"] and "secret" in wanted:
            pieces += self._secret_pieces(context, lead + doc["answer"] + self._end, doc["secret"], "answer" in wanted)
        elif "answer" in wanted:
            pieces.append(("answer", *cut(doc["answer"]), True))
        if "truth" in wanted and doc["paraphrased_answer"] and doc["perturbed_answer"]:
            pieces.append(("paraphrased", *cut(doc["paraphrased_answer"]), False))
            pieces += [("perturbed", *cut(wrong), False) for wrong in doc["perturbed_answer"]]
        return pieces or [("answer", *cut(doc["answer"]), True)]

    def _secret_pieces(
        self, context: str, continuation: str, secret: str, with_answer: bool
    ) -> list[tuple[str, str, str, bool]]:
        whole = context + continuation
        found = re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", continuation)
        start = len(context) + (found.start() if found else continuation.index(secret))
        context, continuation = self._tokens.cut(context, continuation)
        start, end = self._tokens.span(whole, start, start + len(secret), len(context))
        at_end = end == len(whole)
        pieces = [("secret", whole[:start], whole[start:end], with_answer and at_end)]
        if with_answer and not at_end:
            pieces.append(("answer", context, continuation, True))
        elif with_answer and start > len(context):
            pieces.append(("before", context, whole[len(context) : start], True))
        return pieces

    def process_results(self, doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """The values of one document for the metrics it has the fields for."""
        if "bypass" in self._metric_fn_list:
            return {}
        answered = list(zip(self._parts[doc["id"]], results, strict=True))
        self._finite(doc, [loss for _, loss, _ in scored_by_likelihood(answered)])
        return self._listed(self._values(doc, answered))

    def _values(self, doc: Doc, answered: Sequence[tuple[Part, Any]]) -> dict[str, Any]:
        """Every value that the answers give; a subclass adds those of its own requests and metrics."""
        scored, group, values = scored_by_likelihood(answered), doc["group"], dict[str, Any]()
        if answer := [(loss, part.tokens) for part, loss, _ in scored if part.in_answer]:
            nll, count = sum(loss for loss, _ in answer), sum(number for _, number in answer)
            values["ppl"] = values["token_ppl"] = (nll, count, group)
            values["prob"] = (float(answer_probability(nll, count)[0]), group)
        for part, loss, greedy in scored:
            if part.kind == "secret":
                values["secret_ppl"] = (loss, part.tokens, group)
                values["extraction"] = values["extraction_any"] = (float(greedy), group)
                values["extraction_100"] = (float(discoverable([-loss], 100)[0]), group)
        if losses := truth_losses(scored):
            values["truth_ratio"] = (log_truth_ratio(*losses), group)
        return values


def scored_by_likelihood(answered: Sequence[tuple[Part, Any]]) -> list[tuple[Part, float, bool]]:
    """(part, loss in nats, whether it is greedy) of each log-likelihood among the answers."""
    return [(part, -got[0], got[1]) for part, got in answered if part.request_type == "loglikelihood"]


def truth_losses(scored: Sequence[tuple[Part, float, bool]]) -> tuple[float, list[float]] | None:
    """Mean losses per token of the paraphrased answer and of the perturbed ones, where both were scored."""
    per_token = [(part.kind, loss / part.tokens) for part, loss, _ in scored]
    right = [loss for kind, loss in per_token if kind == "paraphrased"]
    wrong = [loss for kind, loss in per_token if kind == "perturbed"]
    return (right[0], wrong) if right and wrong else None


class ReasoningTask(DataTask):
    """Multiple choice and generation in one task: the log-likelihood of every choice, and a greedy answer."""

    UNTIL = ("\n", ".")
    MOST_TOKENS = 24

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """A request per choice, then the one that generates."""
        choices = super().construct_requests(doc, ctx, **options)
        generated = Instance(
            request_type="generate_until",
            doc=dict(doc),
            arguments=(ctx, {"until": [*self.UNTIL], "do_sample": False, "max_gen_toks": self.MOST_TOKENS}),
            idx=len(choices),
            metadata=options["metadata"],
        )
        return [*choices, generated]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """Whether the likeliest choice is right, and whether the generated text says it."""
        if "bypass" in self._metric_fn_list:
            return {}
        choices, text = results[:-1], results[-1]
        likelihoods = [likelihood for likelihood, _ in choices]
        self._finite(doc, likelihoods)
        best = likelihoods.index(max(likelihoods))
        return with_bounds(
            {
                "acc": (float(best == doc["gold"]), doc["group"]),
                "exact_match": (float(normalised(text) == normalised(doc["answer"])), doc["group"]),
            }
        )


def normalised(text: str) -> str:
    """A short answer without white space around it, a final full stop and upper case."""
    return " ".join(text.split()).rstrip(" .").casefold()
