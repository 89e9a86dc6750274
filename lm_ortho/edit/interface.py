"""The registry of edits: functions that choose the codes of the base stream on the support."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lm_ortho.edit.input_metric import InputMetric
from lm_ortho.objective import Objective
from lm_ortho.registry import Registry
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder


@dataclass(frozen=True)
class EditInput:
    """The inputs of an edit. Mappings go by layer name; weights are (out_features, in_features).

    Attributes:
        model: The merged model, in evaluation mode.
        layers: The linear layers that are decomposed. An edit may move their weights; the caller restores them.
        weights: The merged weights.
        base_weights: The weights before fine-tuning, or None if they are not known.
        codes: Codes (int8) of the base stream before the edit.
        scales: Scales (out_features, groups) of the base stream.
        support: Boolean mask of the positions whose codes the edit may change.
        other_supports: Boolean mask of the positions of other memories (possibly empty). They stay on while this one
            is edited: the model has the merged weights there.
        metrics: Returns the coordinates of each layer's support (``InputMetric``). They are computed at the present
            weights of the model, so call it before these are moved, and only if needed.
        bits: Bits per code.
        group_size: Weights per scale, along in_features.
        step_units: The length in which the learning rate of a layer is given (``projection.lattice.layer_units``).
        steps: Number of optimiser steps.
        lr: Peak learning rate: the change of the outputs of all layers, as a share of them, by a step in all
            coordinates.
        objective: Returns the objective, which gives losses and gradients. The first call prepares the target, so
            edits without gradients do not call it.
        seed: Seed of all random draws.
        progress: Called after every step.
        resume: Stores the state of a long edit, so that it can be resumed.
    """

    model: nn.Module
    layers: Mapping[str, nn.Linear]
    weights: Mapping[str, Tensor]
    base_weights: Mapping[str, Tensor] | None
    codes: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    support: Mapping[str, Tensor]
    other_supports: Mapping[str, Tensor]
    metrics: Callable[[], Mapping[str, InputMetric]]
    bits: int
    group_size: int
    step_units: Mapping[str, float]
    steps: int
    lr: float
    objective: Callable[[], Objective]
    seed: int
    progress: ProgressCallback
    resume: ResumeFolder = NO_RESUME


Edit = Callable[[EditInput], dict[str, Tensor]]
"""Returns the edited codes (out_features, in_features) int8 per layer; off the support they equal ``codes``."""

EDITS: Registry[Edit] = Registry("edit", "lm_ortho.edits")
