"""Second moments of what every linear layer is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from lm_ortho.calibration.by_block import Halted
from lm_ortho.data.encoding import Example, batch_by_length, compute_logits, lengths, max_batch_tokens, pad

DAMPING = 0.01
"""Share of the mean diagonal that is added to it before inverting, as in the code of GPTQ."""


def damped_inverse(moment: Tensor) -> Tensor:
    """Inverse (in, in) in float64 of a second moment, damped; inputs that never fire get a unit diagonal."""
    h = moment.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    return torch.cholesky_inverse(torch.linalg.cholesky(h))


def find_uncalled_layers(model: nn.Module, layers: Mapping[str, nn.Linear], example: Example) -> list[str]:
    """Names of the layers that ``model`` never calls, although what it says depends on their weights.

    It then multiplies by the weight itself, so that another layer in that place would go unnoticed. The weights have to
    require gradients.
    """
    called: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()
    ]
    try:
        logits = compute_logits(model, pad([example], next(model.parameters()).device)[0])
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name in layers if name not in called]
    if not silent or not logits.requires_grad:
        return []
    weights = [layers[name].weight for name in silent]
    gradients = torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)
    return [name for name, g in zip(silent, gradients, strict=True) if g is not None]


class _PartialError(Exception):
    """A layer was given some of the positions only, as the experts of a mixture are."""


class _NotSharedError(Exception):
    """A layer that was given the same tensor as another one was not any more."""


class _EnoughError(Exception):
    """All layers asked about have been called; what follows in the model is not needed."""


def input_moments(model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example]) -> dict[str, Tensor]:
    """E[x x^T] (in, in) in float32 per layer, over all real tokens of the examples; padding is left out.

    Layers that are given the very same tensor (query, key and value) share one. To a layer that sees some of the tokens
    only (an expert) the others count as x = 0. Which tokens it saw cannot be told, so documents of different lengths
    are then kept apart, and nothing is padded.
    """
    padded, shared = True, True
    while True:
        batches = batch_by_length(examples, padded=padded, tokens=max_batch_tokens(model))
        try:
            return _Pass(model, layers, examples, batches, shared).moments()
        except _PartialError:
            padded = False
        except _NotSharedError:
            shared = False


class BlockMoments:
    """``input_moments`` of the layers of one block after the other; each block is gone through once.

    Only where ``by_block.goes_by_block`` holds. To go back to an earlier block is to begin again.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], examples: Sequence[Example]) -> None:
        self._model, self._blocks, self._examples = model, blocks, examples
        self._padded = True
        self._begin()

    def of(self, number: int, layers: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """Moments (in, in) of ``layers``, all of which are in block ``number``."""
        shared = True
        while True:
            if number < self._halted.at:
                self._begin()
            while self._halted.at < number:
                self._halted.advance()
            try:
                made = _Pass(self._model, layers, self._examples, self._numbers, shared)
                return made.moments(self._halted)
            except _PartialError:
                self._padded = False
                self._begin()
            except _NotSharedError:
                shared = False

    def _begin(self) -> None:
        self._numbers = batch_by_length(self._examples, padded=self._padded, tokens=max_batch_tokens(self._model))
        batches = [[self._examples[i] for i in batch] for batch in self._numbers]
        self._halted = Halted(self._model, self._blocks, batches)


class _Pass:
    """One pass of the examples through the model, up to the last layer that is asked about.

    The first batch shows which layers are given the same tensor (if inputs may be ``shared``), and whether each layer
    is called once.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        examples: Sequence[Example],
        batches: list[list[int]],
        shared: bool,
    ) -> None:
        self._model, self._layers, self._examples, self._batches = model, layers, examples, batches
        self._shared, self._once = shared, False
        self._sums: dict[str, Tensor] = {}
        self._like: dict[str, str] = {}
        self._inputs: dict[str, tuple[Tensor, int]] = {}
        self._calls: dict[str, int] = {}
        self._real: Tensor | None = None

    @torch.no_grad()
    def moments(self, halted: Halted | None = None) -> dict[str, Tensor]:
        """Of a whole pass, or of documents that are ``halted`` (in the same batches) before the block of the layers."""
        handles = [layer.register_forward_pre_hook(partial(self._add, name)) for name, layer in self._layers.items()]
        try:
            if halted is not None:
                halted.advance(self._next)
            for number, batch in enumerate(self._batches if halted is None else ()):
                self._run([self._examples[i] for i in batch])
                self._once = self._once or (number == 0 and set(self._calls.values()) == {1})
        finally:
            for handle in handles:
                handle.remove()
        tokens = int(lengths(self._examples).sum())
        zero = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in self._unseen()}
        found = {name: moment / tokens for name, moment in {**zero, **self._sums}.items()}
        return {name: found[self._like.get(name, name)] for name in self._layers}

    def _unseen(self) -> list[tuple[str, nn.Linear]]:
        return [
            (name, layer) for name, layer in self._layers.items() if name not in self._like and name not in self._sums
        ]

    def _run(self, chosen: Sequence[Example]) -> None:
        self._next(chosen)
        with suppress(_EnoughError):
            self._model(input_ids=pad(chosen, next(self._model.parameters()).device)[0], use_cache=False)
        self._inputs = {}

    def _next(self, chosen: Sequence[Example]) -> None:
        own = lengths(chosen)
        real = torch.arange(int(own.max()))[None].lt(own[:, None]).flatten()
        self._real = None if real.all() else real.to(next(self._model.parameters()).device)
        self._shared = self._shared and not self._calls  # later batches must bear out what the first one showed
        self._inputs, self._calls = {}, dict.fromkeys(self._layers, 0)

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given = inputs[0]
        self._calls[name] += 1
        if self._shared and self._calls[name] == 1:
            same = next((other for other, seen in self._inputs.items() if _alike(seen, given)), None)
            if same is not None:
                self._like[name] = same
        if name not in self._like:
            self._inputs[name] = given, _writes(given)
            x = _without_padding(given.reshape(-1, given.shape[-1]).float(), self._real)
            product = (x.T @ x).cpu()
            self._sums[name] = self._sums[name] + product if name in self._sums else product
        elif not _alike(self._inputs.get(self._like[name]), given):
            raise _NotSharedError
        if self._once and all(self._calls.values()):
            raise _EnoughError


def _writes(tensor: Tensor) -> int:
    """How often it was written to, if it counts that: a block may add to the very tensor that a layer was given."""
    return 0 if tensor.is_inference() else tensor._version


def _alike(seen: tuple[Tensor, int] | None, given: Tensor) -> bool:
    return seen is not None and seen[0] is given and seen[1] == _writes(given)


def _without_padding(x: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        return x
    if len(x) != len(real):
        raise _PartialError
    return x[real]
