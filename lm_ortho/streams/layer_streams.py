"""All streams of one linear layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lm_ortho.streams.base_stream import BaseStream
from lm_ortho.streams.ortho_stream import OrthoStream
from lm_ortho.streams.validation import validate_bias, validate_disjoint

DEFAULT_MEMORY = "memory"
"""The name of the memory of a model that has only one."""
RESERVED_NAMES = ("hub", DEFAULT_MEMORY)
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def is_valid_memory_name(name: str) -> bool:
    """Whether ``name`` may name one of several memories: lower-case letters, digits, underscores; not ``hub``."""
    return bool(_NAME.fullmatch(name)) and name not in RESERVED_NAMES


@dataclass(frozen=True, eq=False)
class LayerStreams:
    """The streams of one layer, W(alpha) = W_base + alpha * W_ortho, and its bias.

    Attributes:
        base: the base stream.
        ortho: the ortho stream of the only memory; None in a base-only model, which differs from an empty stream.
        bias: (out_features,), stored in BF16; it belongs to neither stream.
        named_memories: the ortho streams of further memories, each with its own alpha; their supports are disjoint.
    """

    base: BaseStream
    ortho: OrthoStream | None = None
    bias: Tensor | None = None
    named_memories: Mapping[str, OrthoStream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_memories()
        if self.bias is None:
            return
        validate_bias(self.bias, self.base.shape[0])
        object.__setattr__(self, "bias", self.bias.detach().to(torch.bfloat16))

    def _check_memories(self) -> None:
        for name in self.named_memories:
            if not is_valid_memory_name(name):
                raise ValueError(f"memory name {name!r} must match {_NAME.pattern} and not be one of {RESERVED_NAMES}")
        for name, ortho in self.memories.items():
            if ortho.shape != self.base.shape:
                raise ValueError(f"base {self.base.shape} and ortho {ortho.shape} of {name} differ in shape")
        validate_disjoint(
            self.shape, {name: {"rowptr": ortho.rowptr, "cols": ortho.cols} for name, ortho in self.memories.items()}
        )

    @property
    def memories(self) -> dict[str, OrthoStream]:
        """Every ortho stream by the name of its memory."""
        return {**({} if self.ortho is None else {DEFAULT_MEMORY: self.ortho}), **self.named_memories}

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.base.shape

    @property
    def n_weights(self) -> int:
        """Number of weights of the matrix, without the bias."""
        return self.shape[0] * self.shape[1]

    @property
    def nnz(self) -> int:
        """Number of values in the ortho streams."""
        return sum(ortho.nnz for ortho in self.memories.values())

    def to_dense(self, alpha: float | Mapping[str, float] = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """W(alpha), (out_features, in_features), computed in at least float32 and rounded once.

        ``alpha`` is one number for all memories, or one for each by name (those left out: 0).

        Raises:
            ValueError: for an alpha other than 0 of a memory whose ortho stream is missing.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self.base.dequantise(wide)
        factors = (
            dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(self.memories or (DEFAULT_MEMORY,), alpha)
        )
        for name, factor in factors.items():
            if factor and name not in self.memories:
                raise ValueError(f"alpha={factor} without an ortho stream of {name}")
            if factor:
                weight.add_(self.memories[name].to_dense(wide), alpha=factor)
        return weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the base stream, first memory and bias by the name they have in a checkpoint."""
        ortho = {} if self.ortho is None else self.ortho.tensors()
        bias = {} if self.bias is None else {"bias": self.bias}
        return {**self.base.tensors(), **ortho, **bias}

    def nbytes(self) -> int:
        """Bytes of all streams, without the bias, which belongs to no stream."""
        return self.base.nbytes() + sum(ortho.nbytes() for ortho in self.memories.values())

    def bits_per_weight(self) -> float:
        """Stored bits per weight of the matrix: codes, scales, indices, values and padding."""
        return 8 * self.nbytes() / self.n_weights

    def to(self, device: Any) -> LayerStreams:
        """The same streams on another device."""
        return LayerStreams(
            self.base.to(device),
            None if self.ortho is None else self.ortho.to(device),
            None if self.bias is None else self.bias.to(device),
            {name: ortho.to(device) for name, ortho in self.named_memories.items()},
        )
