"""Logits of a model, of all tokens or of those that count: the output embedding of a large vocabulary is expensive."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

_thread = threading.local()
"""``mask``: the boolean mask (rows, tokens) of the pass that a thread makes; ``used``: whether a head applied it."""


def compute_logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Next-token logits in float32: (rows, tokens, vocabulary), or (positions, vocabulary) at the ``mask``.

    Args:
        ids: token ids (rows, tokens).
        mask: boolean (rows, tokens), the positions whose logits are needed, in row-major order of the result. Inside
            ``selected_logits`` the output embedding computes those only.
    """
    if mask is None:
        return cast(Any, model)(input_ids=ids, use_cache=False).logits.float()
    _thread.mask, _thread.used = mask.to(ids.device), False
    try:
        logits: Tensor = cast(Any, model)(input_ids=ids, use_cache=False).logits
    finally:
        _thread.mask = None
    return (logits[0] if _thread.used else logits[mask.to(logits.device)]).float()


@contextmanager
def selected_logits(model: nn.Module) -> Iterator[None]:
    """Context in which the output embedding of ``model`` is multiplied at the positions of a mask only.

    It holds for all threads that call ``compute_logits`` with this model. A model that does not call its output
    embedding as a module computes all logits, as outside.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(_select_positions)
    try:
        yield
    finally:
        handle.remove()


def _select_positions(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The hidden states (1, positions, hidden) at the mask of this thread in the place of (rows, tokens, hidden)."""
    mask = getattr(_thread, "mask", None)
    if mask is None or not inputs or inputs[0].shape[:2] != mask.shape:
        return None
    _thread.used = True
    return (inputs[0][mask.to(inputs[0].device)][None], *inputs[1:])


@contextmanager
def first_logits_only(model: Any) -> Iterator[None]:
    """Context in which the output embedding is multiplied at the first token of each row only: nobody reads the logits.

    For a large vocabulary they would be by far the largest activation.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield
        return

    def select_first(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (inputs[0][:, :1], *inputs[1:]) if inputs and inputs[0].dim() == 3 else None

    handle = head.register_forward_pre_hook(select_first)
    try:
        yield
    finally:
        handle.remove()
