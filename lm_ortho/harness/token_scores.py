"""Two request types that lm-eval lacks: a score for every token, and the norm of the gradient.

lm-eval passes every request to the method of the model that has the name of the request type. This module adds such
methods to all models. Models that compute with PyTorch (``hf``, ``libortho``) return values. Other models return None,
and the task reports the metric as not available.
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
"""Token ids of the context, at least one, and of the continuation."""


class TokenScores(NamedTuple):
    """Scores of each token of a continuation, given the true tokens before it; logarithms are natural.

    ``logp`` is the log-probability of the token, ``greedy`` whether it is the most likely one. ``mean`` and
    ``deviation`` are the mean and standard deviation of log p(z) for z drawn from the model's own distribution at that
    position.
    """

    logp: list[float]
    greedy: list[bool]
    mean: list[float]
    deviation: list[float]


def score_tokens(logits: Tensor, targets: Tensor) -> TokenScores:
    """Scores ``targets`` (tokens,) under ``logits`` (tokens, vocabulary); computes in float32."""
    logp = torch.log_softmax(logits.float(), -1)
    share = logp.exp()
    finite_logp = torch.where(share > 0, logp, torch.zeros_like(logp))  # 0 log 0 is 0, also for masked logits
    mean = (share * finite_logp).sum(-1)
    variance = (share * (finite_logp - mean[:, None]).square()).sum(-1)
    return TokenScores(
        logp=logp.gather(-1, targets[:, None])[:, 0].tolist(),
        greedy=(logp.argmax(-1) == targets).tolist(),
        mean=mean.tolist(),
        deviation=variance.sqrt().tolist(),
    )


def token_scores(lm: Any, requests: Sequence[Any]) -> list[TokenScores | None]:
    """Returns the ``TokenScores`` of each request (context, continuation).

    A model without a PyTorch forward pass gets None for each.

    Raises:
        UserError: for a continuation longer than the context length of the model.
    """
    if not _is_torch_model(lm):
        return _return_unavailable(lm, requests)
    # 1. Tokenise as lm-eval does, and sort the longest first, so that a batch that fits is followed by ones that fit.
    pairs = [_encode_pair(lm, *request.args) for request in requests]
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]) - len(pairs[i][1]), pairs[i]))
    results: list[TokenScores | None] = [None] * len(pairs)
    progress = tqdm(total=len(pairs), desc="Running token_scores requests", disable=_hides_progress(lm))
    for numbers in _split_into_batches(lm, order, pairs):
        # 2. Run the padded batch; padding on the right does not change the positions before it.
        inputs = [_make_input(lm, *pairs[number]) for number in numbers]
        batch = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        for number, ids, logits in zip(numbers, inputs, lm._model_call(batch), strict=True):
            # 3. Score the last positions, those that predict the continuation.
            targets = torch.tensor(pairs[number][1], device=logits.device)
            results[number] = score_tokens(logits[len(ids) - len(targets) : len(ids)], targets)
        progress.update(len(numbers))
    progress.close()
    return results


def gradient_norm(lm: Any, requests: Sequence[Any]) -> list[float | None]:
    """Returns the mean over linear layers of |d loss / d W| (Frobenius norm) of each request.

    The loss is the mean over the tokens of the continuation in nats. Each norm is computed from the activations and
    their gradients, so packed weights need no gradient of their own. Source: Wang et al. 2024, Pandora's White-Box,
    arXiv 2402.17012, over linear layers instead of all parameters.
    """
    if not _is_torch_model(lm):
        return _return_unavailable(lm, requests)
    pairs = [_encode_pair(lm, *request.args) for request in requests]
    progress = tqdm(pairs, desc="Running gradient_norm requests", disable=_hides_progress(lm))
    return [_compute_gradient_norm(lm, pair) for pair in progress]


def add_request_types() -> None:
    """Adds the two methods to the base class of lm-eval models, unless it has its own."""
    methods: dict[str, Callable[[Any, Sequence[Any]], list[Any]]] = {
        TOKEN_SCORES: token_scores,
        GRADIENT_NORM: gradient_norm,
    }
    for name, method in methods.items():
        if not hasattr(LM, name):
            setattr(LM, name, method)


def _is_torch_model(lm: Any) -> bool:
    return isinstance(getattr(lm, "model", None), nn.Module) and getattr(lm, "backend", "causal") == "causal"


def _return_unavailable(lm: Any, requests: Sequence[Any]) -> list[Any]:
    log.warning("%s returns sums over answers only: metrics that need every token are n/a", type(lm).__name__)
    return [None] * len(requests)


def _hides_progress(lm: Any) -> bool:
    """Returns whether this is not the first of several processes."""
    return bool(getattr(lm, "rank", 0) != 0)


def _encode_pair(lm: Any, context: str, continuation: str) -> Pair:
    """Tokenises a request as ``loglikelihood`` of lm-eval does."""
    if context:
        context_ids, continuation_ids = lm._encode_pair(context, continuation)
    else:
        continuation_ids = lm.tok_encode(continuation, add_special_tokens=False)
        context_ids = [lm.prefix_token_id]
        if continuation_ids[0] == lm.prefix_token_id:
            context_ids, continuation_ids = continuation_ids[:1], continuation_ids[1:]
    if not 0 < len(continuation_ids) <= lm.max_length:
        raise UserError(f"max_length={lm.max_length}: an answer of {len(continuation_ids)} tokens cannot be scored")
    return list(context_ids), list(continuation_ids)


def _make_input(lm: Any, context: list[int], continuation: list[int]) -> Tensor:
    """Returns the last token ids that fit the context length, without the final one, which is only predicted."""
    ids = (context + continuation)[-(lm.max_length + 1) :][:-1]
    return torch.tensor(ids, dtype=torch.long, device=lm.device)


def _split_into_batches(lm: Any, order: list[int], pairs: list[Pair]) -> Iterator[list[int]]:
    """Yields the request numbers of each batch."""
    vocabulary = lm.model.config.get_text_config().vocab_size
    start = 0
    while start < len(order):
        rows = _requested_batch_size(lm)  # read anew for every batch: it may be halved after running out of memory
        longest = min(sum(map(len, pairs[order[start]])), lm.max_length)
        max_rows = getattr(lm, "most_rows", None) or device.MAX_BATCH_ROWS
        rows = rows or device.max_batch_rows(longest, vocabulary, str(lm.device), max_rows)
        yield order[start : start + rows]
        start += rows


def _requested_batch_size(lm: Any) -> int | None:
    """Returns the batch size of the user; None where the memory decides (``auto``, or LibOrthoLM without one)."""
    rows = getattr(lm, "batch_size", 1)
    return None if getattr(lm, "most_rows", None) or not isinstance(rows, int) else rows


def _compute_gradient_norm(lm: Any, pair: Pair) -> float:
    # 1. Record the input and output of every call of every linear layer; the embeddings start the graph.
    layer_calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    layers = {name: module for name, module in lm.model.named_modules() if _is_linear(module)}
    hooks = [module.register_forward_hook(_make_recorder(name, layer_calls)) for name, module in layers.items()]
    hooks.append(lm.model.get_input_embeddings().register_forward_hook(_require_gradient))
    ids = _make_input(lm, *pair)
    targets = torch.tensor(pair[1], device=ids.device)
    try:
        # 2. Compute the mean loss over the continuation, and its gradient with respect to those outputs.
        with torch.enable_grad():
            logits = lm.model(ids[None]).logits[0, -len(targets) :]
            loss = nn.functional.cross_entropy(logits.float(), targets.to(logits.device))
            outputs = [output for calls in layer_calls.values() for _, output in calls]
            gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    finally:
        for hook in hooks:
            hook.remove()
    # 3. Average the norms of the weight gradients over layers.
    norms = [_weight_gradient_norm([(x, next(gradients)) for x, _ in calls]) for calls in layer_calls.values()]
    return sum(norms) / len(norms)


def _make_recorder(
    name: str, layer_calls: dict[str, list[tuple[Tensor, Tensor]]]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Returns a forward hook that appends (input, output) to the calls of the layer ``name``."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer_calls.setdefault(name, []).append((inputs[0].detach(), output))

    return hook


def _require_gradient(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    from lm_ortho.layer import OrthoLinear

    return isinstance(module, nn.Linear | Conv1D | OrthoLinear)


def _weight_gradient_norm(calls: Sequence[tuple[Tensor, Tensor | None]]) -> float:
    """Returns the Frobenius norm of sum over calls and tokens of g x^T, without the matrix: (X X^T) . (G G^T)."""
    pairs = [(x.flatten(0, -2), g.flatten(0, -2)) for x, g in calls if g is not None]
    if not pairs:
        return 0.0
    x, g = (torch.cat([pair[i] for pair in pairs]).double() for i in (0, 1))
    return float(((x @ x.T) * (g @ g.T)).sum().clamp_min(0).sqrt())


add_request_types()
