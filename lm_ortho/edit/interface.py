"""The registry of edits: which codes the base stream takes on the support."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lm_ortho.objective import Objective
from lm_ortho.registry import Registry
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder


@dataclass(frozen=True)
class EditInput:
    """What an edit may read; mappings go by layer name, tensors are (out, in).

    ``codes`` (int8) and ``scales`` (out, groups) are the base stream before the edit; ``support`` is where
    the edit may change codes; ``taken`` (possibly empty) is where other memories are, which stay on, at ``weights``;
    ``base_weights`` are those before fine-tuning, or None. ``unit`` is the length in which a layer's learning rate is
    given (``projection.lattice.layer_units``), ``steps`` the number of optimiser steps. ``resume`` takes what a long
    edit has reached.
    """

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    weights: Mapping[str, Tensor]
    base_weights: Mapping[str, Tensor] | None
    codes: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    support: Mapping[str, Tensor]
    taken: Mapping[str, Tensor]
    bits: int
    group_size: int
    unit: Mapping[str, float]
    steps: int
    objective: Callable[[], Objective]
    seed: int
    progress: ProgressCallback
    resume: ResumeFolder = NO_RESUME


Edit = Callable[[EditInput], dict[str, Tensor]]
"""Gives the edited codes (out, in) int8 per layer; off the support they must equal the ones given."""

EDITS: Registry[Edit] = Registry("edit")
