"""The registry of sieves: functions that give every weight a saliency score."""

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
    """The inputs of a sieve. Mappings go by layer name; weights are (out_features, in_features), float32.

    Attributes:
        model: The merged model, in evaluation mode.
        layers: The linear layers that are decomposed. A sieve may move their weights but must restore them.
        weights: The merged weights.
        quantised_weights: The weights of the base stream without a support, that is with no edit.
        moments: E[x x^T] (in_features, in_features) over the tokens of the retain rows.
        step_units: The length in which the learning rate of a layer is given (``projection.lattice.layer_units``).
        steps: Number of optimiser steps.
        objective: Returns the objective, which gives losses and gradients. The first call prepares the target, so
            sieves without gradients do not call it.
        seed: Seed of all random draws.
        progress: Called after every step.
        forget: The encoded forget rows.
        retain: The encoded retain rows.
        base_weights: The weights before fine-tuning, or None if they are not known.
        groups: Number of passes, each over a part of the layers.
        optimiser_dtype: The dtype of optimiser states.
        resume: Stores the state of a long pass, so that it can be resumed.
    """

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    weights: Mapping[str, Tensor]
    quantised_weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    step_units: Mapping[str, float]
    steps: int
    objective: Callable[[], Objective]
    seed: int
    progress: ProgressCallback
    forget: Sequence[Example] = ()
    retain: Sequence[Example] = ()
    base_weights: Mapping[str, Tensor] | None = None
    groups: int = 1
    optimiser_dtype: torch.dtype = torch.float32
    resume: ResumeFolder = NO_RESUME


Sieve = Callable[[SieveInput], dict[str, Tensor]]
"""Returns a saliency score per weight (out_features, in_features) by layer name; the highest scores are selected."""
SIEVES: Registry[Sieve] = Registry("sieve", "lm_ortho.sieves")
