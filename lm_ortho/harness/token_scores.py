"""Requests that lm-eval has no kind for: a score for every token, and the norm of the gradient.

lm-eval sends every request to the method of the model that is named like its kind. This module gives all models
such methods: those that compute with PyTorch (``hf``, ``libortho``) answer, the others answer None, and the task
says that the metric is not available.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import LM
from torch import Tensor, nn
from tqdm import tqdm

from lm_ortho.errors import UserError
from lm_ortho.runtime import device

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

TOKEN_SCORES = "token_scores"
GRADIENT_NORM = "gradient_norm"

Pair = tuple[list[int], list[int]]
"""Tokens of the context, at least one, and of the continuation."""


class TokenScores(NamedTuple):
    """One entry per token of a continuation, each given the true tokens before it; logarithms are natural.

    ``logp`` is its log-probability, ``greedy`` whether it is the likeliest. ``mean`` and ``deviation`` are those of
    log p(z) for z drawn from the model's own distribution at its place.
    """

    logp: list[float]
    greedy: list[bool]
    mean: list[float]
    deviation: list[float]


def scores_of(logits: Tensor, wanted: Tensor) -> TokenScores:
    """Scores of ``wanted`` (tokens,) under ``logits`` (tokens, vocabulary), computed in float32."""
    logp = torch.log_softmax(logits.float(), -1)
    share = logp.exp()
    finite = torch.where(share > 0, logp, torch.zeros_like(logp))  # 0 log 0 is 0, also for masked logits
    mean = (share * finite).sum(-1)
    variance = (share * (finite - mean[:, None]).square()).sum(-1)
    own = logp.gather(-1, wanted[:, None])[:, 0]
    return TokenScores(own.tolist(), (logp.argmax(-1) == wanted).tolist(), mean.tolist(), variance.sqrt().tolist())


def token_scores(lm: Any, requests: Sequence[Any]) -> list[TokenScores | None]:
    """One ``TokenScores`` per request (context, continuation); None each from a model without a PyTorch forward pass.

    Raises:
        UserError: for a continuation longer than the model's context.
    """
    if not _is_torch_model(lm):
        return _unavailable(lm, requests)
    pairs = [_encoded(lm, *request.args) for request in requests]
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]) - len(pairs[i][1]), pairs[i]))
    answers: list[TokenScores | None] = [None] * len(pairs)
    bar = tqdm(total=len(pairs), desc="Running token_scores requests", disable=getattr(lm, "rank", 0) != 0)
    for numbers in _batches(lm, order, pairs):
        inputs = [_input(lm, *pairs[number]) for number in numbers]
        batch = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        for number, given, logits in zip(numbers, inputs, lm._model_call(batch), strict=True):
            wanted = torch.tensor(pairs[number][1], device=logits.device)
            answers[number] = scores_of(logits[len(given) - len(wanted) : len(given)], wanted)
        bar.update(len(numbers))
    bar.close()
    return answers


def gradient_norm(lm: Any, requests: Sequence[Any]) -> list[float | None]:
    """Mean over linear layers of |d loss / d W| (Frobenius) per request; the loss is the mean over its tokens in nats.

    Each is taken from the activations and their gradients, so packed weights need no gradient of their own. Source:
    Wang et al. 2024, Pandora's White-Box, arXiv 2402.17012, over linear layers instead of all parameters.
    """
    if not _is_torch_model(lm):
        return _unavailable(lm, requests)
    pairs = [_encoded(lm, *request.args) for request in requests]
    hidden = getattr(lm, "rank", 0) != 0
    return [_norm(lm, pair) for pair in tqdm(pairs, desc="Running gradient_norm requests", disable=hidden)]


def attach() -> None:
    """Gives every lm-eval model the two methods, unless a model brings its own."""
    methods: dict[str, Callable[[Any, Sequence[Any]], list[Any]]] = {
        TOKEN_SCORES: token_scores,
        GRADIENT_NORM: gradient_norm,
    }
    for name, method in methods.items():
        if not hasattr(LM, name):
            setattr(LM, name, method)


def _is_torch_model(lm: Any) -> bool:
    return isinstance(getattr(lm, "model", None), nn.Module) and getattr(lm, "backend", "causal") == "causal"


def _unavailable(lm: Any, requests: Sequence[Any]) -> list[Any]:
    log.warning("%s gives sums over answers only: metrics that need every token are n/a", type(lm).__name__)
    return [None] * len(requests)


def _encoded(lm: Any, context: str, continuation: str) -> Pair:
    """The tokens as ``loglikelihood`` of lm-eval takes them."""
    if context:
        given, wanted = lm._encode_pair(context, continuation)
    else:
        wanted = lm.tok_encode(continuation, add_special_tokens=False)
        given = [lm.prefix_token_id]
        if wanted[0] == lm.prefix_token_id:
            given, wanted = wanted[:1], wanted[1:]
    if not 0 < len(wanted) <= lm.max_length:
        raise UserError(
            f"max_length={lm.max_length}: an answer of {len(wanted)} tokens cannot be scored: {continuation[:60]!r}"
        )
    return list(given), list(wanted)


def _input(lm: Any, given: list[int], wanted: list[int]) -> Tensor:
    return torch.tensor((given + wanted)[-(lm.max_length + 1) :][:-1], dtype=torch.long, device=lm.device)


def _batches(lm: Any, order: list[int], pairs: list[Pair]) -> Iterator[list[int]]:
    """Request numbers per batch; the longest come first, so a batch that fits is followed by batches that fit."""
    vocabulary = lm.model.config.get_text_config().vocab_size
    start = 0
    while start < len(order):
        rows = _asked_rows(lm)
        longest = min(sum(map(len, pairs[order[start]])), lm.max_length)
        most = getattr(lm, "most_rows", None) or device.BATCH_ROWS
        rows = rows or device.batch_rows(longest, vocabulary, str(lm.device), most)
        yield order[start : start + rows]
        start += rows


def _asked_rows(lm: Any) -> int | None:
    """The batch size the user gave; None where it is ours to choose (``auto``, or LibOrthoLM without one)."""
    rows = getattr(lm, "batch_size", 1)
    return None if getattr(lm, "most_rows", None) or not isinstance(rows, int) else rows


def _norm(lm: Any, pair: Pair) -> float:
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(name, []).append((inputs[0].detach(), output))

        return hook

    def needs_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    layers = {name: module for name, module in lm.model.named_modules() if _is_linear(module)}
    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    hooks.append(lm.model.get_input_embeddings().register_forward_hook(needs_gradient))
    given = _input(lm, *pair)
    wanted = torch.tensor(pair[1], device=given.device)
    try:
        with torch.enable_grad():
            logits = lm.model(given[None]).logits[0, -len(wanted) :]
            loss = nn.functional.cross_entropy(logits.float(), wanted.to(logits.device))
            outputs = [output for calls in seen.values() for _, output in calls]
            gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    finally:
        for hook in hooks:
            hook.remove()
    norms = [_weight_norm([(x, next(gradients)) for x, _ in calls]) for calls in seen.values()]
    return sum(norms) / len(norms)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    from lm_ortho.layer import OrthoLinear

    return isinstance(module, nn.Linear | Conv1D | OrthoLinear)


def _weight_norm(calls: Sequence[tuple[Tensor, Tensor | None]]) -> float:
    """Frobenius norm of sum over calls and tokens of g x^T, without the matrix: (X X^T) . (G G^T)."""
    used = [(x.flatten(0, -2), g.flatten(0, -2)) for x, g in calls if g is not None]
    if not used:
        return 0.0
    x, g = (torch.cat([pair[i] for pair in used]).double() for i in (0, 1))
    return float(((x @ x.T) * (g @ g.T)).sum().clamp_min(0).sqrt())


attach()
