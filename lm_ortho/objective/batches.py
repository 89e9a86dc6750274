"""Which rows a step takes, and in which parts they go through the model."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import Any

from torch import nn

from lm_ortho.data.encoding import Example
from lm_ortho.runtime.offload import is_offloaded
from lm_ortho.runtime.precision import is_checkpointed, transformer_blocks

ACTIVATION_BYTES = 2**30
"""Bytes of activations that the parts of a step hold at the same time, unless a quarter of the model is more."""
LOGITS = 2**25
"""Number of logits that the parts of a step hold at the same time: 128 MB for each copy in float32."""
OFFLOADED = 8
"""Factor of both budgets for an offloaded model, whose weights are copied to the device once more for every part."""
_LOSS_OFFSET = 0.01
"""Nats added to the last loss of a row, so that every row can be drawn."""


def sample_examples(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """``count`` of the examples, or all of them if there are fewer, in random order."""
    return random.Random(seed).sample(list(examples), min(count, len(examples)))


class Batches:
    """Draws batches of row indices: one half from shuffled passes, the other half by the last loss of the rows.

    Most rows are right most of the time; the gradient comes from the few that are not.
    """

    def __init__(self, total: int, size: int, seed: int) -> None:
        self.size = min(size, total)
        self._total, self._queue = total, list[int]()
        self._random = random.Random(seed)
        self._last_losses = [0.0] * total

    def next(self) -> list[int]:
        """The indices of the next batch, each once."""
        # 1. Take one half from the shuffled passes.
        half = self.size - self.size // 2
        if len(self._queue) < half:
            self._queue.extend(self._random.sample(range(self._total), self._total))
        batch = list(dict.fromkeys(self._queue[:half]))
        del self._queue[:half]
        # 2. Draw the other half without replacement, weighted by the last loss of each row: the largest u^(1/w) are
        #    such a draw (Efraimidis and Spirakis 2006).
        first_half = set(batch)
        keys = (
            (math.log(1.0 - self._random.random()) / (loss + _LOSS_OFFSET), i)
            for i, loss in enumerate(self._last_losses)
        )
        second_half = [i for _, i in nlargest(self.size, keys) if i not in first_half]
        return batch + second_half[: self.size - len(batch)]

    def state(self) -> dict[str, Any]:
        """The state that determines the next batches, as plain values."""
        return {"queue": list(self._queue), "draw": self._random.getstate(), "last": list(self._last_losses)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continues from a ``state``."""
        self._queue, self._last_losses = list(state["queue"]), list(state["last"])
        version, internal, gauss = state["draw"]
        self._random.setstate((version, tuple(internal), gauss))

    def record_losses(self, rows: Sequence[int], losses: Sequence[float]) -> None:
        """Records the losses of the ``rows`` of a batch."""
        for i, loss in zip(rows, losses, strict=True):
            self._last_losses[i] = max(0.0, loss)


@dataclass(frozen=True)
class Budget:
    """The largest part of a step: ``tokens`` with padding, and ``positions`` whose logits are computed."""

    tokens: int
    positions: int

    def holds(self, part: Sequence[Example], positions: int) -> bool:
        """Whether these rows, with the sum of their ``positions``, are no more than the budget."""
        tokens = len(part) * max(len(example.ids) for example in part)
        return tokens <= self.tokens and positions <= self.positions


def part_budget(model: nn.Module, layers: Mapping[str, nn.Linear], workers: int) -> Budget:
    """The budget of a part where ``workers`` parts run at the same time.

    Autograd holds the input and less than two copies of the output of every layer in ``layers``, in float32; measured
    on Llamas, a quarter less. A model whose activations are computed again holds those of one block, and the inputs
    of all.
    """
    blocks = max(1, len(transformer_blocks(model)))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    token_bytes = 4.0 * sum(layer.in_features + 2 * layer.out_features for layer in layers.values())
    if is_checkpointed(model) or is_offloaded(model):
        token_bytes = token_bytes / blocks + 4.0 * blocks * _hidden_size(model)
    factor = OFFLOADED if is_offloaded(model) else 1
    tokens = factor * max(ACTIVATION_BYTES, weights / 4) / token_bytes / workers
    return Budget(max(1, int(tokens)), max(1, logit_positions(model) // workers))


def logit_positions(model: nn.Module) -> int:
    """The largest number of positions whose logits are held at the same time."""
    logits = LOGITS * (OFFLOADED if is_offloaded(model) else 1)
    return max(1, logits // int(_text_config(model).vocab_size))


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _hidden_size(model: nn.Module) -> int:
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(getattr(_text_config(model), "hidden_size", embeddings.weight.shape[1]))


def split_into_parts(
    rows: Sequence[int], examples: Sequence[Example], positions: Sequence[int], budget: Budget
) -> list[list[int]]:
    """Splits ``rows`` (indices of ``examples``) into parts of similar length within the ``budget``.

    ``positions`` is the number of logits that each example needs. Where two parts are enough these are the short and
    the long rows of ``split_by_length``; a row that exceeds the budget alone is a part.
    """
    parts = split_by_length(rows, examples)
    if all(budget.holds([examples[i] for i in part], sum(positions[i] for i in part)) for part in parts):
        return parts
    # Sorted by length, the last row of a part is its longest, so that little of a part is padding.
    parts = []
    for i in sorted(rows, key=lambda i: len(examples[i].ids)):
        larger_part = [*parts[-1], i] if parts else []
        if larger_part and budget.holds([examples[j] for j in larger_part], sum(positions[j] for j in larger_part)):
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


def split_by_length(rows: Sequence[int], examples: Sequence[Example]) -> list[list[int]]:
    """Splits ``rows`` into short and long ones where that leaves the least padding; one part if there is one row."""
    order = sorted(rows, key=lambda i: len(examples[i].ids))
    size = [len(examples[i].ids) for i in order]
    cut = min(range(1, len(order) + 1), key=lambda at: at * size[at - 1] + (len(order) - at) * size[-1])
    if cut == len(order):
        cut = len(order) // 2  # all of one length: two halves can run side by side
    return [part for part in (order[:cut], order[cut:]) if part]
