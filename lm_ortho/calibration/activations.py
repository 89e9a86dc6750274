"""Second moments of the inputs of every linear layer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from lm_ortho.calibration.by_block import BlockwisePass
from lm_ortho.data.encoding import Example, batch_by_length, count_tokens, max_batch_tokens, pad_batch
from lm_ortho.data.logits import compute_logits, first_logits_only
from lm_ortho.runtime.progress import track

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal before inversion, as in the code of GPTQ."""


def damped_inverse(moment: Tensor) -> Tensor:
    """Returns the damped inverse (in, in) of a second moment in float64; inputs that never fire get a unit diagonal."""
    h = moment.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    return torch.cholesky_inverse(torch.linalg.cholesky(h))


def find_uncalled_layers(model: nn.Module, layers: Mapping[str, nn.Linear], example: Example) -> list[str]:
    """Returns the names of layers that ``model`` never calls although its logits depend on their weights.

    Such a model multiplies by the weight itself, so replacing the layer would have no effect. The weights have to
    require gradients.
    """
    called_layers: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called_layers.add(name)) for name, layer in layers.items()
    ]
    try:
        logits = compute_logits(model, pad_batch([example], next(model.parameters()).device)[0])
    finally:
        for handle in handles:
            handle.remove()
    uncalled_layers = [name for name in layers if name not in called_layers]
    if not uncalled_layers or not logits.requires_grad:
        return []
    weights = [layers[name].weight for name in uncalled_layers]
    gradients = torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)
    return [name for name, gradient in zip(uncalled_layers, gradients, strict=True) if gradient is not None]


class _SomeTokensOnlyError(Exception):
    """A layer received some of the tokens only, as the experts of a mixture do."""


class _InputNotSharedError(Exception):
    """A layer that received the same tensor as another one in the first batch received a different one later."""


class _AllLayersCalledError(Exception):
    """Ends a forward pass: all layers of interest have been called, and the rest of the model is not needed."""


def input_moments(model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example]) -> dict[str, Tensor]:
    """Returns E[x x^T] (in, in) in float32 for each layer, over all real tokens of the examples, without padding.

    Layers that receive the same tensor object (query, key and value) share one moment. For a layer that receives some
    of the tokens only (an expert), the other tokens count as x = 0. It is not visible which tokens a layer received,
    so documents of different lengths are then batched separately, without padding.
    """
    allow_padding, share_inputs = True, True
    while True:
        batches = batch_by_length(examples, allow_padding=allow_padding, tokens=max_batch_tokens(model))
        moment_pass = _MomentPass(model, layers, examples, batches=batches, share_inputs=share_inputs)
        try:
            return moment_pass.compute()
        except _SomeTokensOnlyError:
            allow_padding = False
        except _InputNotSharedError:
            share_inputs = False


class BlockMoments:
    """The ``input_moments`` of one block after the other; the documents go through each block once.

    Requires a model that passes ``by_block.supports_blockwise``. Access to an earlier block starts a new pass.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], examples: Sequence[Example]) -> None:
        self._model, self._blocks, self._examples = model, blocks, examples
        self._allow_padding = True
        self._start_pass()

    def release(self) -> None:
        """Frees the inputs of the next block; a later access starts a new pass."""
        self._start_pass()

    def compute(self, number: int, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """Returns the moments (in, in) of ``layers``, which all have to be in block ``number``."""
        share_inputs = True
        while True:
            # 1. Take all documents to the input of the block.
            if number < self._blockwise_pass.next_block:
                self._start_pass()
            while self._blockwise_pass.next_block < number:
                self._blockwise_pass.advance()
            # 2. Take them through the block and sum up the moments on the way.
            moment_pass = _MomentPass(
                self._model, layers, self._examples, batches=self._batches, share_inputs=share_inputs
            )
            try:
                return moment_pass.compute(self._blockwise_pass)
            # 3. Repeat with weaker assumptions where the block does not bear them out.
            except _SomeTokensOnlyError:
                self._allow_padding = False
                self._start_pass()
            except _InputNotSharedError:
                share_inputs = False

    def _start_pass(self) -> None:
        self._batches = batch_by_length(
            self._examples, allow_padding=self._allow_padding, tokens=max_batch_tokens(self._model)
        )
        batches = [[self._examples[i] for i in batch] for batch in self._batches]
        self._blockwise_pass = BlockwisePass(self._model, self._blocks, batches)


class _MomentPass:
    """One pass of the examples through the model, up to the last layer of interest.

    The first batch shows which layers receive the same tensor (with ``share_inputs``), and whether each layer is called
    exactly once.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        examples: Sequence[Example],
        *,
        batches: list[list[int]],
        share_inputs: bool,
    ) -> None:
        self._model, self._layers, self._examples, self._batches = model, layers, examples, batches
        self._share_inputs, self._is_called_once = share_inputs, False
        self._sums: dict[str, Tensor] = {}
        self._shared_with: dict[str, str] = {}
        self._inputs: dict[str, _InputRecord] = {}
        self._calls: dict[str, int] = {}
        self._token_mask: Tensor | None = None

    @torch.no_grad()
    def compute(self, blockwise_pass: BlockwisePass | None = None) -> dict[str, Tensor]:
        """Returns the moment (in, in) of each layer.

        From a whole pass, or with ``blockwise_pass`` (of the same batches) from its next block, which has the layers.
        """
        # 1. Sum up x x^T in a hook of each layer while the documents go through the model.
        handles = [layer.register_forward_pre_hook(partial(self._add, name)) for name, layer in self._layers.items()]
        try:
            if blockwise_pass is None:
                self._run_whole_pass()
            else:
                blockwise_pass.advance(self._start_batch)
        finally:
            for handle in handles:
                handle.remove()
        # 2. Layers that received no token (experts) have a moment of zero.
        zeros = {
            name: torch.zeros(layer.in_features, layer.in_features)
            for name, layer in self._layers.items()
            if name not in self._shared_with and name not in self._sums
        }
        # 3. Divide by the number of real tokens; layers that receive the same tensor share one moment.
        tokens = int(count_tokens(self._examples).sum())
        moments = {name: total / tokens for name, total in {**zeros, **self._sums}.items()}
        return {name: moments[self._shared_with.get(name, name)] for name in self._layers}

    def _run_whole_pass(self) -> None:
        for number, batch in enumerate(track(self._batches, "statistics")):
            self._run_batch([self._examples[i] for i in batch])
            self._is_called_once = self._is_called_once or (number == 0 and set(self._calls.values()) == {1})

    def _run_batch(self, batch: Sequence[Example]) -> None:
        self._start_batch(batch)
        with suppress(_AllLayersCalledError), first_logits_only(self._model):
            self._model(input_ids=pad_batch(batch, next(self._model.parameters()).device)[0], use_cache=False)
        self._inputs = {}

    def _start_batch(self, batch: Sequence[Example]) -> None:
        widths = count_tokens(batch)
        token_mask = torch.arange(int(widths.max()))[None].lt(widths[:, None]).flatten()
        self._token_mask = None if token_mask.all() else token_mask.to(next(self._model.parameters()).device)
        # Only the first batch decides which inputs are shared; later ones must confirm it.
        self._share_inputs = self._share_inputs and not self._calls
        self._inputs, self._calls = {}, dict.fromkeys(self._layers, 0)

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Adds one input of the layer ``name`` to its sum; a forward pre-hook."""
        layer_input = inputs[0]
        self._calls[name] += 1
        # 1. In the first batch: find another layer that received the same tensor.
        if self._share_inputs and self._calls[name] == 1:
            matches = (other for other, record in self._inputs.items() if _is_same_input(record, layer_input))
            if (first_match := next(matches, None)) is not None:
                self._shared_with[name] = first_match
        # 2. Add x x^T, or check that the input is still the same as that of the other layer.
        if name not in self._shared_with:
            self._inputs[name] = weakref.ref(layer_input), _count_writes(layer_input)
            x = _remove_padding(layer_input.reshape(-1, layer_input.shape[-1]).float(), self._token_mask)
            product = (x.T @ x).cpu()
            self._sums[name] = self._sums[name] + product if name in self._sums else product
        elif not _is_same_input(self._inputs.get(self._shared_with[name]), layer_input):
            raise _InputNotSharedError
        # 3. End the pass where no further call can follow.
        if self._is_called_once and all(self._calls.values()):
            raise _AllLayersCalledError


def _count_writes(tensor: Tensor) -> int:
    """Returns PyTorch's count of in-place writes, 0 where there is none: a block may add to the input of a layer."""
    return 0 if tensor.is_inference() else tensor._version


_InputRecord = tuple["weakref.ref[Tensor]", int]
"""An input and its number of writes. The reference does not keep it: the inputs of all layers are far larger than what
a forward pass holds at any time, and two layers share an input only while it exists."""


def _is_same_input(record: _InputRecord | None, layer_input: Tensor) -> bool:
    return record is not None and record[0]() is layer_input and record[1] == _count_writes(layer_input)


def _remove_padding(x: Tensor, token_mask: Tensor | None) -> Tensor:
    if token_mask is None:
        return x
    if len(x) != len(token_mask):
        raise _SomeTokensOnlyError
    return x[token_mask]
