"""Block-wise forward passes: all documents go through one block before any goes through the next.

Statistics of one block after the other would otherwise repeat the early blocks in every pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example, pad_batch
from lm_ortho.runtime.precision import replace_forwards
from lm_ortho.runtime.progress import track

log = logging.getLogger(__name__)


class _BlockFinishedError(Exception):
    """Ends a forward pass after the block of interest; carries the output of the block."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def compute_block_output(model: nn.Module, block: nn.Module, ids: Tensor) -> Any:
    """Returns the output of ``block`` for ``ids`` (rows, tokens); the rest of the model is not computed.

    Raises:
        RuntimeError: for a block that the model does not call.
    """

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _BlockFinishedError(output)

    # 1. Run the model with a hook that ends the pass as soon as the block returns.
    handle = block.register_forward_hook(stop)
    try:
        model(input_ids=ids, use_cache=False)
    # 2. The exception of the hook carries the output.
    except _BlockFinishedError as finished:
        return finished.output
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} never calls its block {type(block).__name__}")


class BlockwisePass:
    """Batches of documents that go through the blocks of a model together, one block at a time.

    The output of the last block for each batch is stored on the CPU. Each step calls the whole model, and the blocks
    before the next one return the stored output instead of computing. So masks, positions and everything else that a
    model passes to its blocks are the model's own. Correct only for models that pass ``supports_blockwise``, and only
    while the weights of the blocks before the next one do not change.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Sequence[Example]]) -> None:
        self.model, self.blocks, self.batches = model, list(blocks), list(batches)
        self.next_block = 0
        """Index of the block that ``advance`` computes next."""
        self._outputs: list[Any] = [None] * len(self.batches)

    @torch.no_grad()
    def advance(self, before_batch: Callable[[Sequence[Example]], None] = lambda batch: None) -> None:
        """Takes every batch through the next block; ``before_batch`` is called with each batch before it is computed.

        If an exception ends it, the state is as before the call.
        """
        # 1. Compute the next block for every batch, from the stored outputs of the block before.
        outputs = []
        for number, batch in enumerate(track(self.batches, "statistics")):
            before_batch(batch)
            outputs.append(_move_to(self._compute_next_block(number), torch.device("cpu")))
        # 2. Replace the stored outputs only when all batches are through.
        self._outputs = outputs
        self.next_block += 1

    @torch.no_grad()
    def finish(self, number: int) -> Any:
        """Returns the output of the model for one batch, computed from the next block on; the state is unchanged."""
        with self._skip_computed_blocks(number):
            return self.model(input_ids=self.input_ids(number), use_cache=False)

    def input_ids(self, number: int) -> Tensor:
        """Returns the token ids (rows, tokens) of one batch, on the device of the model."""
        return pad_batch(self.batches[number], next(self.model.parameters()).device)[0]

    def _compute_next_block(self, number: int) -> Any:
        with self._skip_computed_blocks(number):
            return compute_block_output(self.model, self.blocks[self.next_block], self.input_ids(number))

    @contextmanager
    def _skip_computed_blocks(self, number: int) -> Iterator[None]:
        """Context in which the blocks before the next one return the stored output of a batch."""
        output = _move_to(self._outputs[number], next(self.model.parameters()).device, copy=True)
        with replace_forwards({block: lambda *_, **__: output for block in self.blocks[: self.next_block]}):
            yield


def supports_blockwise(model: nn.Module, blocks: Sequence[nn.Module], examples: Sequence[Example]) -> bool:
    """Returns whether a block-wise pass over ``examples`` has the same logits as a whole pass.

    It has not where blocks pass on more than they return, or are not called in the order of ``blocks``.
    """
    # 1. Try two different documents side by side, one of them the shortest. With a single document, any state that a
    #    block leaves behind in the model would happen to be the right one.
    by_length = sorted(examples, key=lambda example: len(example.ids))
    probes = [by_length[0], *[example for example in by_length if example.ids != by_length[0].ids][:1]]
    blockwise_pass = BlockwisePass(model, blocks, [[example] for example in probes])
    try:
        # 2. Take both through all blocks.
        for _ in blocks:
            blockwise_pass.advance()
        # 3. Compare the logits with those of whole passes.
        return all(_has_same_logits(blockwise_pass, number) for number in range(len(probes)))
    except torch.OutOfMemoryError:
        raise
    # 4. A model that fails in a block-wise pass does not support it.
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        log.info("statistics: %s cannot be run one block at a time (%s)", type(model).__name__, error)
        return False


@torch.no_grad()
def _has_same_logits(blockwise_pass: BlockwisePass, number: int) -> bool:
    # The block-wise pass comes first: a whole pass could leave behind a state that the block-wise pass lacks.
    logits = blockwise_pass.finish(number).logits
    expected = blockwise_pass.model(input_ids=blockwise_pass.input_ids(number), use_cache=False).logits
    return bool(torch.allclose(logits, expected, rtol=1e-4, atol=1e-5))


def _move_to(value: Any, device: torch.device, copy: bool = False) -> Any:
    """Returns ``value`` with its tensors on ``device``; with ``copy`` they are copies, which blocks may write to."""
    if isinstance(value, Tensor):
        return value.to(device, copy=copy)
    return tuple(_move_to(part, device, copy) for part in value) if type(value) is tuple else value
