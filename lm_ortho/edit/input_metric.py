"""Coordinates of the latent weights in which steps of equal length change the outputs for the retain rows equally.

The output of a neuron changes by d = x . delta when its weights change by delta, and on the retain rows the mean of d^2
is delta^T H delta, with H = E[x x^T]. Of a row of a layer only the weights on the support move, so their block of H
counts. In its eigenbasis, with steps divided by the square roots of the eigenvalues, all directions cost the same. Adam
knows nothing of this: it gives every weight a step of the same length, whatever the inputs have in common, and most of
what that costs the retain rows comes from the few directions in which all inputs point. Natural gradient with one
factor of K-FAC (Martens and Grosse 2015, arXiv 1503.05671); Adam in the eigenbasis of a curvature: George et al. 2018,
arXiv 1806.03884, and Vyas et al. 2024, arXiv 2409.11321.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.03
"""Share of the mean diagonal of H that is added to its eigenvalues."""
MAX_POSITIONS = 128
"""Positions of a row that have a common basis; a row with more of them on the support has several bases."""
BATCH, PADDING = 64, 0.25
"""Most rows whose bases are computed and applied together, and how much longer than the first the last may be; all are
padded to the longest."""


@dataclass(frozen=True)
class _Batch:
    """Bases of several rows: ``index`` (rows, width) into the support, -1 where a row is shorter; ``basis``."""

    index: Tensor
    is_real: Tensor
    basis: Tensor


class InputMetric:
    """The coordinates for the support of one layer: a rotation of each row, and the length of a step in each of them.

    Values on the support, in weights or in coordinates, are (positions,), by ascending flat position.
    """

    def __init__(self, support: Tensor, moments: Tensor, weights: Tensor) -> None:
        """Computes the bases of a ``support`` (out_features, in_features; bool) from ``moments`` (in, in), float32.

        ``weights`` (out, in) are those of the layer, which its outputs follow from.
        """
        floor, change = DAMPING * float(moments.diagonal().mean()), 0.0
        self.step_lengths = torch.ones(int(support.sum()), device=moments.device)
        """Length of a step in each coordinate; their root mean square is 1."""
        self._batches = list[_Batch]()
        for index, columns in _batch_rows(support.to(moments.device)):
            is_real = index >= 0
            # 1. The block of H of each row. The padding has an eigenvalue above all others, so it comes last.
            block = moments[columns[:, :, None], columns[:, None, :]]
            block = block * (is_real[:, :, None] & is_real[:, None, :])
            largest = block.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-30)
            block = block + torch.diag_embed(torch.where(is_real, 0.0, 2 * largest[:, None]))
            # 2. Its eigenbasis, and step lengths of one over the square root of the eigenvalues.
            eigenvalues, basis = torch.linalg.eigh(block)
            self._batches.append(_Batch(index, is_real, basis))
            eigenvalues = eigenvalues.clamp_min(0)
            self.step_lengths[index[is_real]] = (eigenvalues + floor + 1e-30).rsqrt()[is_real]
            change += float((eigenvalues / (eigenvalues + floor + 1e-30))[is_real].sum())
        # 3. Their scale is arbitrary: the learning rate is in units of their root mean square.
        mean_square = float(self.step_lengths.square().mean()) if len(self.step_lengths) else 1.0
        self.step_lengths /= mean_square**0.5
        # 4. The mean squared change of the outputs, over their mean square.
        weights = weights.to(moments.device)
        square = float((weights @ moments * weights).sum()) if len(self.step_lengths) else 0.0
        self.relative_change = (change / mean_square / square) ** 0.5 if square > 0 else 0.0
        """Change of the outputs, as a share of them, by a step of ``step_lengths`` in all coordinates; both RMS."""

    def rotate(self, values: Tensor) -> Tensor:
        """The coordinates (positions,) of values of weights."""
        return self._multiply(values, "rk,rkj->rj")

    def rotate_back(self, coordinates: Tensor) -> Tensor:
        """The values of weights (positions,) with these coordinates."""
        return self._multiply(coordinates, "rk,rjk->rj")

    def _multiply(self, values: Tensor, equation: str) -> Tensor:
        result = torch.empty_like(values)
        for batch in self._batches:
            padded_values = torch.where(batch.is_real, values[batch.index], 0.0)
            result[batch.index[batch.is_real]] = torch.einsum(equation, padded_values, batch.basis)[batch.is_real]
        return result


def _batch_rows(support: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields parts of rows in batches of similar length: indices into the support, and their columns (0 as padding).

    A row of n positions has ceil(n / MAX_POSITIONS) parts of equal length, give or take one.
    """
    # 1. The parts: where each begins among the positions of the support, and its length.
    columns = support.nonzero()[:, 1]
    counts = support.sum(1)
    pieces = (counts + MAX_POSITIONS - 1) // MAX_POSITIONS
    row = torch.arange(len(counts), device=support.device).repeat_interleave(pieces)
    number = torch.arange(len(row), device=support.device) - (pieces.cumsum(0) - pieces)[row]
    start, end = (counts[row] * k // pieces[row] for k in (number, number + 1))
    first, length = (counts.cumsum(0) - counts)[row] + start, end - start
    # 2. Batches of parts of similar length.
    order = length.argsort(stable=True)
    for batch in order.split(_group_lengths(length[order].tolist())):
        offset = torch.arange(int(length[batch].max()), device=support.device)[None]
        index = torch.where(offset < length[batch, None], first[batch, None] + offset, -1)
        yield index, torch.where(index >= 0, columns[index], 0)


def _group_lengths(lengths: Sequence[int]) -> list[int]:
    """Sizes of batches of ascending ``lengths``, each of similar ones."""
    sizes, shortest = list[int](), 0
    for length in lengths:
        if not sizes or sizes[-1] == BATCH or length > shortest * (1 + PADDING) + 1:
            sizes.append(0)
            shortest = length
        sizes[-1] += 1
    return sizes
