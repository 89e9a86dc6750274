"""The registry of sieves: a score per weight, higher means rather in the ortho stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example
from lm_ortho.objective import Objective
from lm_ortho.registry import Registry
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder


@dataclass(frozen=True)
class SieveInput:
    """What a sieve may read. All mappings go by layer name; weights and codes are (out, in), float32.

    ``rounded`` is what the base stream would hold without any support; ``moments`` is E[x x^T] (in, in) on
    retain documents; ``unit`` is the length in which a layer's learning rate is given
    (``projection.lattice.layer_units``); ``objective`` builds what gives gradients; only who needs it asks, because it
    needs a target. ``steps`` is the number of optimiser steps asked for. ``forget`` and ``retain`` are the
    documents; ``base_weights`` are those before fine-tuning, or None. ``groups`` is the number of passes over a
    part of the layers each, ``states`` the dtype of optimiser states, ``resume`` takes what a long pass has reached.
    """

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    weights: Mapping[str, Tensor]
    rounded: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    unit: Mapping[str, float]
    steps: int
    objective: Callable[[], Objective]
    seed: int
    progress: ProgressCallback
    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    base_weights: Mapping[str, Tensor] | None = None
    groups: int = 1
    states: torch.dtype = torch.float32
    resume: ResumeFolder = NO_RESUME


Sieve = Callable[[SieveInput], dict[str, Tensor]]
SIEVES: Registry[Sieve] = Registry("sieve")
