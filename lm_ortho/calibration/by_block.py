"""Documents that go through a model one block at a time, so that no block has to be gone through twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example, pad
from lm_ortho.runtime.precision import computing_by

log = logging.getLogger(__name__)


class _HaltError(Exception):
    """The block in question is done; what follows in the model is not needed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def output_of(model: nn.Module, block: nn.Module, ids: Tensor) -> Any:
    """What ``block`` gives for ``ids`` (rows, tokens); the rest of the model is not computed.

    Raises ``RuntimeError`` for a block that the model does not call.
    """

    def halt(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _HaltError(output)

    handle = block.register_forward_hook(halt)
    try:
        model(input_ids=ids, use_cache=False)
    except _HaltError as halted:
        return halted.output
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} never calls its block {type(block).__name__}")


class Halted:
    """Batches of documents on their way through the blocks of a model, all halted before the same block.

    What the last block gave to each batch is held on the CPU. The model is called as ever; blocks that are done stand
    in for themselves by returning that, so masks, positions and whatever else a model hands to its blocks are its own.
    Right only for models that pass ``goes_by_block``, and as long as nobody changes weights of blocks that are done.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Sequence[Example]]) -> None:
        self.model, self.blocks, self.batches = model, list(blocks), list(batches)
        self.at = 0
        """How many blocks are done."""
        self._outputs: list[Any] = [None] * len(self.batches)

    @torch.no_grad()
    def advance(self, ready: Callable[[Sequence[Example]], None] = lambda batch: None) -> None:
        """Takes every batch through the next block; ``ready`` is told each before it goes.

        Where an exception ends it, all batches are where they were.
        """
        outputs = []
        for number, batch in enumerate(self.batches):
            ready(batch)
            outputs.append(_to(self._run(number), torch.device("cpu")))
        self._outputs = outputs
        self.at += 1

    @torch.no_grad()
    def rest(self, number: int) -> Any:
        """What the model says of a batch, from where it is."""
        with self._standing_in(number):
            return self.model(input_ids=self._ids(number), use_cache=False)

    def _run(self, number: int) -> Any:
        with self._standing_in(number):
            return output_of(self.model, self.blocks[self.at], self._ids(number))

    @contextmanager
    def _standing_in(self, number: int) -> Iterator[None]:
        given = _to(self._outputs[number], next(self.model.parameters()).device, copy=True)
        with computing_by({block: lambda *_, **__: given for block in self.blocks[: self.at]}):
            yield

    def _ids(self, number: int) -> Tensor:
        return pad(self.batches[number], next(self.model.parameters()).device)[0]


def goes_by_block(model: nn.Module, blocks: Sequence[nn.Module], examples: Sequence[Example]) -> bool:
    """Whether the model says the same of documents that go through it one block at a time, side by side.

    Not so where blocks hand something on beside what they return, or are called in another order than they stand. Of
    ``examples`` the shortest and another one are tried: with one alone, what is left behind would be the right one's.
    """
    order = sorted(examples, key=lambda example: len(example.ids))
    tried = [order[0], *[example for example in order if example.ids != order[0].ids][:1]]
    halted = Halted(model, blocks, [[example] for example in tried])
    try:
        for _ in blocks:
            halted.advance()
        return all(_agree(halted, number) for number in range(len(tried)))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        log.info("statistics: %s cannot be gone through one block at a time (%s)", type(model).__name__, error)
        return False


@torch.no_grad()
def _agree(halted: Halted, number: int) -> bool:
    rest = halted.rest(number).logits  # first: a whole pass would leave behind what this one may lack
    whole = halted.model(input_ids=halted._ids(number), use_cache=False).logits
    return bool(torch.allclose(rest, whole, rtol=1e-4, atol=1e-5))


def _to(value: Any, device: torch.device, copy: bool = False) -> Any:
    """Tensors of ``value`` on ``device``; as copies, which blocks may write to, if ``copy``."""
    if isinstance(value, Tensor):
        return value.to(device, copy=copy)
    return tuple(_to(part, device, copy) for part in value) if type(value) is tuple else value
