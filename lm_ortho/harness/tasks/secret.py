"""Task classes with several kinds of requests per document, which the task types of lm-eval lack.

A YAML file uses them as ``class: !function lm_ortho.harness.tasks.secret.SecretTask``.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from lm_ortho.errors import UserError
from lm_ortho.harness import tokens
from lm_ortho.harness.chat_template import describe_chat_template, hash_json
from lm_ortho.harness.tasks import datasets
from lm_ortho.harness.tokens import Tokens
from lm_ortho.metrics import answer_probability, log_truth_ratio
from lm_ortho.metrics.memorisation import extraction_probability
from lm_ortho.pipeline.code_hash import evaluation_hash, versions

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

Doc = Mapping[str, Any]


class DataTask(ConfigurableTask):
    """A task whose documents come from a function, and whose cached requests are tied to these documents."""

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        download_mode: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {key: value for key, value in (config or {}).items() if key != "class"}
        # Without a function here, lm-eval looks up every metric by its name, in the last resort on the network.
        settings["process_results"] = settings.get("process_results") or "process_results"
        super().__init__(data_dir=data_dir, cache_dir=cache_dir, download_mode=download_mode, config=settings)
        # ``--predict_only`` replaces the list of metrics, and must send the same requests as without it.
        self._metric_names = [entry["metric"] for entry in self.config.metric_list or ()]

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Calls ``custom_dataset`` with the metadata (the model args), overridden by ``dataset_kwargs``."""
        self.dataset = self.config.custom_dataset(**{**(self.config.metadata or {}), **(dataset_kwargs or {})})

    def build_all_requests(self, *, cache_requests: bool = False, tokenizer_name: str = "", **options: Any) -> None:
        """Builds the requests; the key of ``--cache_requests`` includes whatever shapes a prompt."""
        if cache_requests:
            tokenizer_name += f"-data{hash_json(self._request_ingredients(options.get('chat_template')))[:32]}"
        super().build_all_requests(cache_requests=cache_requests, tokenizer_name=tokenizer_name, **options)

    def _request_ingredients(self, chat_template: Callable[..., str] | None) -> dict[str, Any]:
        """Returns whatever shapes the requests, as JSON; lm-eval adds the number of shots and the system instruction.

        Metadata is left out: it has the model args, of which alpha and many others shape no prompt. What a task reads
        from it shapes the documents, or the task adds it.
        """
        config = self.config.to_dict(keep_callable=False)
        config.pop("metadata", None)
        shots = self.fewshot_docs() if self.config.num_fewshot else None
        draw = getattr(self, "fewshot_rnd", None)
        return {
            "code": [type(self).__qualname__, str(self.VERSION), evaluation_hash(), versions()],
            "config": {name: re.sub(r" at 0x\w+", "", str(value)) for name, value in config.items()},
            "documents": datasets.fingerprint(self.eval_docs),
            "shots": None if shots is None else datasets.fingerprint(shots),
            "draw": draw.getstate() if shots is not None and draw is not None else None,
            "chat": None if chat_template is None else describe_chat_template(chat_template),
        }

    def _check_finite(self, doc: Doc, likelihoods: Sequence[float]) -> None:
        bad = [likelihood for likelihood in likelihoods if not math.isfinite(likelihood)]
        if bad:
            raise UserError(
                f"{self.task_name}: the model returned {bad[0]} as a log-likelihood in document {doc['id']}; "
                "try dtype=float32"
            )

    def _select_metrics(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values and bounds that the YAML file lists; a p-value, for example, has no bounds."""
        return {name: value for name, value in add_bounds(values).items() if name in self._metric_names}

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics of the YAML file, without the bounds, also where lm-eval computes none of them."""
        return [name for name in self._metric_names if not name.endswith(("_low", "_high"))]


def add_bounds(values: Mapping[str, Any]) -> dict[str, Any]:
    """Assigns the value of each metric to the metric and to both bounds of its interval."""
    return {name + end: value for name, value in values.items() for end in ("", "_low", "_high")}


@dataclass
class MeasurementRequest(Instance):
    """A request that stores what it measures (``kind``), on how many tokens, and whether these are in the answer.

    ``lead`` is the number of tokens at the start of its continuation that are not measured: white space at the end of a
    prompt, which lm-eval (0.4.13) moves there.
    """

    kind: str = ""
    tokens: int = 0
    in_answer: bool = False
    lead: int = 0


class Segment(NamedTuple):
    """A text to score: what it measures, the context, the continuation, and whether it is part of the answer."""

    kind: str
    context: str
    continuation: str
    in_answer: bool


LEAD = "lead"
"""Kind of the request for the white space between a prompt and its answer."""
Response = tuple[MeasurementRequest, Any]
"""A request with the response of the model; of a log-likelihood (log-likelihood in nats, whether it is greedy)."""


class MeasurementTask(DataTask):
    """A task that stores its requests by document, so that each response can be assigned to its measurement."""

    _tokens: Tokens
    _requests: dict[int, list[MeasurementRequest]]
    _as_chat = False

    def fewshot_context(self, doc: Doc, *args: Any, **options: Any) -> str | list[str]:
        """Returns the prompt; in a chat, the message is the question alone, as in the decomposition."""
        self._as_chat = bool(options.get("apply_chat_template"))
        try:
            prompt: str | list[str] = super().fewshot_context(doc, *args, **options)
            return prompt
        finally:
            self._as_chat = False

    def doc_to_text(self, doc: Doc, doc_to_text: Any = None) -> Any:
        """Returns the question with its prompt template, or alone as the message of a chat."""
        if self._as_chat and doc.get("question") and not doc.get("prompt"):
            return doc["question"]
        return super().doc_to_text(doc, doc_to_text)

    def build_all_requests(self, **options: Any) -> None:
        """Builds the requests under the tokenizer of the model."""
        self._tokens = tokens.resolve(self.config.metadata)
        super().build_all_requests(**options)
        self._requests = {}
        for request in sorted(self._instances, key=lambda request: request.idx):
            self._requests.setdefault(request.doc["id"], []).append(request)

    def _request_ingredients(self, chat_template: Callable[..., str] | None) -> dict[str, Any]:
        return super()._request_ingredients(chat_template) | {"tokens": self._tokens.describe()}

    def _check_length(self, doc: Doc, count: int) -> int:
        """Returns ``count``, the tokens to score. Raises ``UserError`` if the model cannot read them at once."""
        if count > self._tokens.max_length:
            raise UserError(
                f"{self.task_name}: document {doc['id']} has {count} tokens to score after its context, and the model "
                f"reads at most {self._tokens.max_length}; shorten the row or split it into several"
            )
        return count

    def _split_answer(self, doc: Doc, ctx: str, *, is_chat: bool) -> tuple[str, str]:
        """Returns (context, answer) split at a token boundary, without the text that follows the answer."""
        context, lead = self._split_context(doc, ctx, is_chat=is_chat)
        return self._tokens.split_at_boundary(context, lead + doc["answer"])

    @staticmethod
    def _split_context(doc: Doc, ctx: str, *, is_chat: bool) -> tuple[str, str]:
        """Returns the context without white space at its end, and the white space at the start of the answer."""
        context = ctx.rstrip()
        lead = doc["target"][: len(doc["target"]) - len(doc["answer"])]
        return context, ctx[len(context) :] or ("" if is_chat else lead)

    @staticmethod
    def make_request(doc: Doc, number: int, *, metadata: Any, **fields: Any) -> MeasurementRequest:
        """Builds the ``number``-th request of a document; ``fields`` are those of ``MeasurementRequest``."""
        return MeasurementRequest(doc=dict(doc), idx=number, metadata=metadata, **fields)


MEASUREMENTS = {
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
"""The measurement that each metric is computed from."""

_FIELDS = {"secret": "secret", "truth": "paraphrased_answer and perturbed_answer"}
_ANSWERS = "question or prompt with an answer"


class SecretTask(MeasurementTask):
    """Log-likelihoods of answers, of the secret in them, and of their paraphrased and perturbed versions.

    A document has these requests, as far as it has the fields and the YAML file lists the metrics:

    * the answer after the context;
    * the secret after the context and the text of the answer before it. Its ``is_greedy`` is the extraction: greedy
      decoding, given the question and that text, emits the secret exactly;
    * the paraphrased answer, and each perturbed answer.

    All texts are split at token boundaries of the model's tokenizer (``Tokens.split_at_boundary``): a token that
    straddles the start of an answer, or the start or end of the secret, belongs to it. If the secret ends the answer,
    the answer is scored as the text before the secret plus the secret, because lm-eval (0.4.13) confuses two
    continuations that end the same document.
    """

    _end = ""
    """The text that is scored after every answer."""

    def build_all_requests(self, **options: Any) -> None:
        """Builds the requests, and logs the metrics for which no document has the fields."""
        super().build_all_requests(**options)
        available = {kind for requests in self._requests.values() for kind in self._list_measurements(requests)}
        for name in self.metrics:
            measurement = self.required_measurement(name)
            if measurement not in available:
                fields = _FIELDS.get(measurement, _ANSWERS)
                log.info("%s: no %s, because no row has %s", self.task_name, name, fields)

    @classmethod
    def required_measurement(cls, metric: str) -> str:
        """Returns the measurement that a metric is computed from; "" if it needs the document alone."""
        return MEASUREMENTS[metric]

    @property
    def _required_measurements(self) -> set[str]:
        return {self.required_measurement(name) for name in self.metrics}

    @staticmethod
    def _list_measurements(requests: Sequence[MeasurementRequest]) -> set[str]:
        """Returns the measurements that the requests of a document provide."""
        kinds = {request.kind for request in requests}
        measurements = {"secret", "tokens", "generated"} & kinds
        if any(request.in_answer for request in requests):
            measurements.add("answer")
        if {"paraphrased", "perturbed"} <= kinds:
            measurements.add("truth")
        return measurements

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """Builds one request per text to score."""
        segments = self._split_document(doc, ctx, is_chat=bool(options.get("apply_chat_template")))
        return [
            self.make_request(
                doc,
                number,
                metadata=options["metadata"],
                kind=segment.kind,
                request_type="loglikelihood",
                arguments=(segment.context, segment.continuation),
                tokens=self._check_length(doc, self._tokens.count(segment.context, segment.continuation)),
                in_answer=segment.in_answer,
            )
            for number, segment in enumerate(segments)
        ]

    def _split_document(self, doc: Doc, ctx: str, *, is_chat: bool) -> list[Segment]:
        """Splits a document into the texts that have to be scored."""
        # 1. A row of plain text: score all of it, in windows if it is longer than the context length.
        if not doc["context"]:
            windows = self._tokens.split_into_windows(doc["target"])
            return [Segment("text", before, text, in_answer=True) for before, text in windows]
        context, lead = self._split_context(doc, ctx, is_chat=is_chat)

        def make_segment(kind: str, answer: str) -> Segment:
            before, text = self._tokens.split_at_boundary(context, lead + answer + self._end)
            return Segment(kind, before, text, in_answer=kind == "answer")

        required = self._required_measurements
        segments = []
        # 2. The answer, with the secret scored separately if a metric needs it.
        if doc["secret"] and "secret" in required:
            continuation = lead + doc["answer"] + self._end
            segments += self._split_secret(context, continuation, doc["secret"], with_answer="answer" in required)
        elif "answer" in required:
            segments.append(make_segment("answer", doc["answer"]))
        # 3. The paraphrased and the perturbed answers of the truth ratio.
        if "truth" in required and doc["paraphrased_answer"] and doc["perturbed_answer"]:
            segments.append(make_segment("paraphrased", doc["paraphrased_answer"]))
            segments += [make_segment("perturbed", wrong) for wrong in doc["perturbed_answer"]]
        # 4. Every document needs at least one request.
        return segments or [make_segment("answer", doc["answer"])]

    def _split_secret(self, context: str, continuation: str, secret: str, *, with_answer: bool) -> list[Segment]:
        """Returns the segment of the secret, and with ``with_answer`` those that complete the answer."""
        # 1. Find the secret in the answer, preferably as a whole word.
        text = context + continuation
        match = re.search(rf"(?<!\w){re.escape(secret)}(?!\w)", continuation)
        start = len(context) + (match.start() if match else continuation.index(secret))
        # 2. Expand it to token boundaries, at most to the start of the answer.
        context, continuation = self._tokens.split_at_boundary(context, continuation)
        start, end = self._tokens.expand_to_boundaries(text, start, start + len(secret), min_start=len(context))
        at_end = end == len(text)
        segments = [Segment("secret", text[:start], text[start:end], in_answer=with_answer and at_end)]
        # 3. Score the whole answer, or only the text before the secret if the secret ends the answer.
        if with_answer and not at_end:
            segments.append(Segment("answer", context, continuation, in_answer=True))
        elif with_answer and start > len(context):
            segments.append(Segment("before", context, text[len(context) : start], in_answer=True))
        return segments

    def process_results(self, doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """Returns the values of a document for the metrics that it has the fields for."""
        if "bypass" in self._metric_fn_list:
            return {}
        responses = list(zip(self._requests[doc["id"]], results, strict=True))
        self._check_finite(doc, [loss for _, loss, _ in likelihood_losses(responses)])
        return self._select_metrics(self._compute_values(doc, responses))

    def _compute_values(self, doc: Doc, responses: Sequence[Response]) -> dict[str, Any]:
        """Computes every value that the responses permit; a subclass adds those of its own requests and metrics."""
        losses, group = likelihood_losses(responses), doc["group"]
        values: dict[str, Any] = {}
        # 1. The answer: sum its parts.
        answer = [(loss, request.tokens) for request, loss, _ in losses if request.in_answer]
        if answer:
            nll, count = sum(loss for loss, _ in answer), sum(tokens for _, tokens in answer)
            values["ppl"] = values["token_ppl"] = (nll, count, group)
            values["prob"] = (float(answer_probability(nll, count)[0]), group)
        # 2. The secret: its perplexity, and the extraction by greedy decoding and by sampling.
        for request, loss, greedy in losses:
            if request.kind == "secret":
                values["secret_ppl"] = (loss, request.tokens, group)
                values["extraction"] = values["extraction_any"] = (float(greedy), group)
                values["extraction_100"] = (float(extraction_probability([-loss], 100)[0]), group)
        # 3. The truth ratio: wrong answers against the paraphrased right one.
        if ratio_losses := truth_losses(losses):
            values["truth_ratio"] = (log_truth_ratio(*ratio_losses), group)
        return values


def likelihood_losses(responses: Sequence[Response]) -> list[tuple[MeasurementRequest, float, bool]]:
    """Returns (request, loss in nats, whether it is greedy) of each log-likelihood among the responses.

    The loss of the ``lead`` of a request, which has a response of its own, is subtracted.
    """
    likelihoods = [(request, result) for request, result in responses if request.request_type == "loglikelihood"]
    lead = sum(-result[0] for request, result in likelihoods if request.kind == LEAD)
    return [
        (request, max(0.0, -result[0] - lead) if request.lead else -result[0], result[1])
        for request, result in likelihoods
        if request.kind != LEAD
    ]


def truth_losses(losses: Sequence[tuple[MeasurementRequest, float, bool]]) -> tuple[float, list[float]] | None:
    """Returns the mean loss per token of the paraphrased answer and of each perturbed one; None without both."""
    per_token = [(request.kind, loss / request.tokens) for request, loss, _ in losses]
    right = [loss for kind, loss in per_token if kind == "paraphrased"]
    wrong = [loss for kind, loss in per_token if kind == "perturbed"]
    return (right[0], wrong) if right and wrong else None


class ReasoningTask(DataTask):
    """Multiple choice and generation in one task: log-likelihoods of all choices, and a greedy answer."""

    STOP_STRINGS = ("\n", ".")
    MAX_TOKENS = 24

    def construct_requests(self, doc: Doc, ctx: str, **options: Any) -> list[Instance]:
        """Builds a request per choice, and one that generates the answer."""
        choices = super().construct_requests(doc, ctx, **options)
        generation = Instance(
            request_type="generate_until",
            doc=dict(doc),
            arguments=(ctx, {"until": [*self.STOP_STRINGS], "do_sample": False, "max_gen_toks": self.MAX_TOKENS}),
            idx=len(choices),
            metadata=options["metadata"],
        )
        return [*choices, generation]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        """Returns whether the most likely choice is right, and whether the generated text matches the answer."""
        if "bypass" in self._metric_fn_list:
            return {}
        choices, text = results[:-1], results[-1]
        likelihoods = [likelihood for likelihood, _ in choices]
        self._check_finite(doc, likelihoods)
        best = likelihoods.index(max(likelihoods))
        return add_bounds(
            {
                "acc": (float(best == doc["gold"]), doc["group"]),
                "exact_match": (float(normalise_answer(text) == normalise_answer(doc["answer"])), doc["group"]),
            }
        )


def normalise_answer(text: str) -> str:
    """Returns a short answer without surrounding white space, final full stop and upper case."""
    return " ".join(text.split()).rstrip(" .").casefold()
