"""Documents that go through a model one block at a time, so that no block has to be gone through twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.calibration.examples import Example, pad


class _HaltError(Exception):
    """The block in question is done; what follows in the model is not needed."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


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
        def halt(module: nn.Module, inputs: Any, output: Any) -> None:
            raise _HaltError(output)

        handle = self.blocks[self.at].register_forward_hook(halt)
        try:
            with self._standing_in(number):
                self.model(input_ids=self._ids(number), use_cache=False)
        except _HaltError as halted:
            return halted.output
        finally:
            handle.remove()
        raise RuntimeError(f"the model never calls its block {self.at}")

    @contextmanager
    def _standing_in(self, number: int) -> Iterator[None]:
        done = self.blocks[: self.at]
        before = [vars(block).get("forward") for block in done]
        given = _to(self._outputs[number], next(self.model.parameters()).device)
        for block in done:
            vars(block)["forward"] = lambda *_, **__: given
        try:
            yield
        finally:
            for block, forward in zip(done, before, strict=True):
                del vars(block)["forward"]
                if forward is not None:  # what accelerate puts there, say
                    vars(block)["forward"] = forward

    def _ids(self, number: int) -> Tensor:
        return pad(self.batches[number], next(self.model.parameters()).device)[0]


def goes_by_block(model: nn.Module, blocks: Sequence[nn.Module], example: Example) -> bool:
    """Whether the model says the same of a document that goes through it one block at a time.

    Not so where blocks hand something on beside what they return, or are called in another order than they stand.
    """
    halted = Halted(model, blocks, [[example]])
    with suppress(RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        for _ in blocks:
            halted.advance()
        with torch.no_grad():
            whole = model(input_ids=pad([example], next(model.parameters()).device)[0], use_cache=False)
        return bool(torch.allclose(halted.rest(0).logits, whole.logits, rtol=1e-4, atol=1e-5))
    return False


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return tuple(_to(part, device) for part in value) if type(value) is tuple else value
