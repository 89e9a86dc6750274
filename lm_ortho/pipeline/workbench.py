"""The workbench: the merged model during its decomposition, with a method for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from lm_ortho.calibration.by_layer import InputMoments, LayerTensors, snapshot_weights
from lm_ortho.config import Recipe, count_sieve_steps
from lm_ortho.data.chat import ChatRow, has_chat_template
from lm_ortho.data.encoding import encode_rows
from lm_ortho.data.logits import selected_logits
from lm_ortho.data.rows import Row
from lm_ortho.edit import EDITS, EditInput
from lm_ortho.edit.input_metric import InputMetric
from lm_ortho.errors import UserError
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.objective import (
    LossWeights,
    Objective,
    TargetCheck,
    TargetChoice,
    check_target,
    find_rehearsal_rows,
    select_target,
)
from lm_ortho.objective.batches import sample_examples
from lm_ortho.pipeline.model_lattice import Lattice, compute_layer_scales, make_streams, project_blocks
from lm_ortho.pipeline.preparation import (
    device_type,
    encode_sets,
    prepare_layers,
    read_base_weights,
    report_memory_estimate,
)
from lm_ortho.pipeline.report import log_target, mean_steps_moved, target_report
from lm_ortho.projection import PROJECTIONS
from lm_ortho.projection.lattice import compute_scales, dequantise, layer_units
from lm_ortho.runtime.offload import is_offloaded
from lm_ortho.runtime.precision import gradient_checkpointing, select_attention
from lm_ortho.runtime.progress import ProgressCallback, no_progress, show_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.sieve import SIEVES, SieveInput, select_support
from lm_ortho.streams import LayerStreams

METRIC_ROWS = 256
"""Retain rows from which the coordinates of the edit are computed where the moments of all of them are not stored."""


class Workbench:
    """A merged model whose weights are scored, selected and edited; a context manager that restores the weights.

    Inside the context, the model and the base model are in linear form. Everything else is computed when a sieve, the
    projection or an edit first needs it, so that several of them can be compared after one preparation. The context can
    be entered again; the target is then not computed again.

    Attributes:
        sets: forget and retain rows, and their token ids; rehearsal rows join the token ids of the retain set.
        layers: the layers that are decomposed, by name.
        uncalled_layers: names of layers that are not decomposed, because the model reads their weights without a call.
        weights: the original weights (out_features, in_features) float32, by layer name.
        base_weights: the weights of the base model, or None.
        moments: second moments of the inputs (in_features, in_features), by layer name.
        scales: scales (out_features, groups) by layer name; empty for 16 bits.
        other_supports: positions (out, in; bool) of other memories, which stay on, by layer name.
        step_units: the unit of the learning rate of a layer (``projection.lattice.layer_units``), by layer name.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        forget: Sequence[Row],
        retain: Sequence[Row],
        *,
        recipe: Recipe,
        base_model: nn.Module | None = None,
        progress: ProgressCallback = no_progress,
        lattice: Lattice | None = None,
        other_supports: Mapping[str, Tensor] | None = None,
        resume: ResumeFolder = NO_RESUME,
    ) -> None:
        """Raises what ``decompose`` does. Density, sieve, edit and steps are arguments of the methods.

        With a ``lattice`` none is computed. The codes of ``other_supports`` are not changed. ``resume`` stores the
        state of each step; a workbench with the same model, rows and recipe resumes from there.
        """
        PROJECTIONS.get(recipe.projection)
        self.model, self.tokenizer, self.recipe, self.progress = model, tokenizer, recipe, progress
        self.sets = encode_sets(model, tokenizer, forget, retain, recipe=recipe)
        self._base_model, self._resume = base_model, resume
        self._initial_lattice, self.other_supports = lattice, dict(other_supports or {})
        self._is_prepared = False

    def __enter__(self) -> Self:
        self._trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._stack, self.weights = ExitStack(), LayerTensors([], lambda _: Tensor())
        try:
            self._prepare()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        self.weights = LayerTensors([], lambda _: Tensor())
        for name in ("objective", "plain_lattice"):
            vars(self).pop(name, None)

    def _restore(self) -> None:
        _restore_weights(self)
        self._stack.close()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trainable)

    def _prepare(self) -> None:
        """Linear form, copies of the weights, and statistics, which are computed when they are read."""
        model, recipe = self.model, self.recipe
        self._stack.enter_context(show_progress(self.progress))
        # 1. The layers to decompose, as nn.Linear, and a copy of their weights.
        for network in filter(None, (model, self._base_model)):
            self._stack.enter_context(linear_form(network))
        self.layers, self.uncalled_layers = prepare_layers(model, recipe.targets, self.sets.retain)
        self.weights = snapshot_weights(self.layers)
        examples = [*self.sets.forget, *self.sets.retain]
        self.base_weights = read_base_weights(self._base_model, self.layers, examples)
        # 2. What stays when the context is entered again.
        if not self._is_prepared:
            self._prepare_once()
            self._is_prepared = True
        # 3. How passes through the model are computed.
        self._stack.enter_context(selected_logits(model))
        self._stack.enter_context(select_attention(model, self.sets.max_tokens))
        if recipe.recompute and not is_offloaded(model):  # an offloaded model computes its blocks again anyway
            self._stack.enter_context(gradient_checkpointing(model))
        # 4. Second moments of the inputs, which the projection reads.
        self.moments = InputMoments(model, self.layers, self.sets.retain)
        text = f"{len(self.sets.retain)} retain rows, {self.moments.passes} passes, computed when needed"
        self.progress("statistics", 1, 1, text)
        self.quantised_weights = LayerTensors(list(self.layers), partial(_quantise, self))

    def _prepare_once(self) -> None:
        """Announces the memory, and makes the rehearsal rows, the scales, and the units of the learning rates."""
        recipe = self.recipe
        report_memory_estimate(
            self.model,
            self.layers,
            self.sets,
            recipe=recipe,
            base_known=self._base_model is not None,
            progress=self.progress,
        )
        self.rehearsal_rows = _make_rehearsal_rows(self, self._resume) if recipe.recall else []
        self.sets.retain += encode_rows(self.model, self.tokenizer, self.rehearsal_rows, argument="recall")
        lattice = self._initial_lattice
        self.scales = lattice.scales if lattice else compute_layer_scales(self.weights, recipe)
        self.step_units = layer_units(
            self.scales or {name: compute_scales(weight, 4, 64) for name, weight in self.weights.items()}
        )

    @cached_property
    def plain_lattice(self) -> Lattice:
        """The lattice without a support, which sieves read that look at rounding errors; computed at first use."""
        return self.project(None)

    def project(self, support: Mapping[str, Tensor] | None) -> Lattice:
        """The lattice around a support (out, in; bool), whose weights count as exact; one that was passed stays."""
        if self._initial_lattice is not None:
            return self._initial_lattice
        codes = project_blocks(
            self.weights,
            self.moments,
            self.scales,
            recipe=self.recipe,
            exact=support,
            progress=self.progress,
            device=device_type(self.model),
            resume=self._resume,
        )
        self.moments.release()
        return Lattice(self.scales, codes)

    @cached_property
    def target(self) -> tuple[TargetChoice, TargetCheck]:
        """The target distribution with the reason for it, and how much of the secrets it reveals; logged once."""
        choice = select_target(
            self.model,
            self.tokenizer,
            rows=self.sets.forget_rows,
            forget=self.sets.forget,
            retain=self.sets.retain,
            base_model=self._base_model,
            steps=self.recipe.steps,
            batch_rows=self.recipe.batch_rows,
            seed=self.recipe.seed,
            progress=self.progress,
            resume=self._resume,
        )
        check = check_target(choice.target, self.sets.forget)
        log_target(choice, check, has_secrets=any(row.secret for row in self.sets.forget_rows))
        return choice, check

    @cached_property
    def objective(self) -> Objective:
        """The loss that sieve and edit minimise; created at first use, with the original weights."""
        choice, _ = self.target
        return Objective(
            self.model,
            self.layers,
            choice.target,
            self.sets.forget,
            self.sets.retain,
            penalty=choice.penalty,
            weights=LossWeights(retain=choice.retain, forget_rows=self.recipe.batch_rows),
            seed=self.recipe.seed,
        )

    def score_weights(self, sieve: str, steps: int) -> dict[str, Tensor]:
        """The saliency scores (out, in) of a sieve; ``steps`` as in the recipe."""
        inputs = SieveInput(
            model=self.model,
            layers=self.layers,
            weights=self.weights,
            quantised_weights=self.quantised_weights,
            moments=self.moments,
            step_units=self.step_units,
            steps=count_sieve_steps(steps),
            objective=lambda: self.objective,
            seed=self.recipe.seed,
            progress=self.progress,
            forget=self.sets.forget,
            retain=self.sets.retain,
            base_weights=self.base_weights,
            groups=self.recipe.groups,
            optimiser_dtype=getattr(torch, self.recipe.states),
            resume=self._resume,
        )
        return SIEVES.get(sieve)(inputs)

    def select_support(self, sieve: str, density: float, steps: int) -> dict[str, Tensor]:
        """The support (out, in; bool): the ``density`` of all weights with the highest scores, none of another memory.

        Raises:
            UserError: for a density of less than one weight.
        """
        total = sum(layer.weight.numel() for layer in self.layers.values())
        if density * total < 1:
            raise UserError(
                f"density={density:g} is less than one of the {total} weights; choose {1.01 / total:.3g} or more"
            )
        if (positions := self._resume.load("support")) is None:
            support = select_support(self.score_weights(sieve, steps), density, self.other_supports)
            positions = {name: mask.flatten().nonzero()[:, 0] for name, mask in support.items()}
            self._resume.save("target", target_report(*self.target) if "target" in vars(self) else None)
            self._resume.save("support", positions)
            self._resume.delete("attribution")
        return {name: _mask(positions[name], layer.weight.shape) for name, layer in self.layers.items()}

    def edit_codes(self, edit: str, lattice: Lattice, support: dict[str, Tensor], *, steps: int) -> dict[str, Tensor]:
        """Codes (out, in) int8 after the edit; off the support, and for 16 bits everywhere, those of the lattice."""
        if self.recipe.bits == 16:
            return lattice.codes
        inputs = EditInput(
            model=self.model,
            layers=self.layers,
            weights=self.weights,
            base_weights=self.base_weights,
            codes=lattice.codes,
            scales=lattice.scales,
            support=support,
            other_supports=self.other_supports,
            metrics=lambda: _compute_metrics(self, support),
            bits=self.recipe.bits,
            group_size=self.recipe.group_size,
            step_units=self.step_units,
            steps=steps,
            lr=self.recipe.lr,
            objective=lambda: self.objective,
            seed=self.recipe.seed,
            progress=self.progress,
            resume=self._resume,
        )
        codes = EDITS.get(edit)(inputs)
        _restore_weights(self)
        _check_off_support(lattice.codes, codes, support)
        return codes

    def make_streams(
        self, codes: dict[str, Tensor], support: Mapping[str, Tensor] | None = None
    ) -> dict[str, LayerStreams]:
        """The streams of these codes; without a support there is no ortho stream."""
        lattice = Lattice(self.scales, codes)
        return make_streams(self.layers, self.weights, lattice, support=support, recipe=self.recipe)

    def report(self, codes: dict[str, Tensor], support: dict[str, Tensor]) -> dict[str, Any]:
        """The report: target, reached density and sizes, as plain JSON."""
        total = sum(weight.numel() for weight in self.weights.values())
        selected = sum(int(mask.sum()) for mask in support.values())
        recipe, lattice = self.recipe, Lattice(self.scales, codes)
        return {
            "density_reached": selected / total,
            "weights": total,
            "support": selected,
            "base_known": self._base_model is not None,
            "chat_template": has_chat_template(self.tokenizer) and recipe.prompts != "plain",
            "forget_rows": len(self.sets.forget),
            "retain_rows": len(self.sets.retain_rows),
            "recalled": {
                "subjects": len({row.subject for row in self.rehearsal_rows}),
                "rows": len(self.rehearsal_rows),
            },
            "left_alone": self.uncalled_layers,
            "target": target_report(*self.target) if "target" in vars(self) else self._resume.load("target"),
            "steps_moved": mean_steps_moved(self.weights, lattice, support, recipe.group_size)
            if recipe.bits != 16
            else 0.0,
        }


@torch.no_grad()
def _restore_weights(bench: Workbench) -> None:
    for name, weight in bench.weights.items():
        bench.layers[name].weight.copy_(weight)


def _make_rehearsal_rows(bench: Workbench, resume: ResumeFolder) -> list[ChatRow]:
    """The rehearsal rows: answers that the model generates about subjects that no retain row names."""
    if (state := resume.load("recall")) is None:
        rows = find_rehearsal_rows(
            bench.model,
            bench.tokenizer,
            bench.sets.forget_rows,
            bench.sets.retain_rows,
            seed=bench.recipe.seed,
            progress=bench.progress,
        )
        state = [(row.rendered_context, row.rendered_target, row.subject) for row in rows]
        resume.save("recall", state)
    return [ChatRow(rendered_context=prompt, rendered_target=answer, subject=name) for prompt, answer, name in state]


def _quantise(bench: Workbench, name: str) -> Tensor:
    if bench.recipe.bits == 16:
        return bench.weights[name].bfloat16().float()
    return dequantise(bench.plain_lattice.codes[name], bench.scales[name], bench.recipe.group_size)


def _compute_metrics(bench: Workbench, support: Mapping[str, Tensor]) -> dict[str, InputMetric]:
    """The coordinates in which the edit moves the weights of the support."""
    moments = bench.moments
    moments.release()
    if not moments.are_small:
        rows = sample_examples(bench.sets.retain, METRIC_ROWS, bench.recipe.seed)
        moments = InputMoments(bench.model, bench.layers, rows)
    return {
        name: InputMetric(support[name], moments[name].to(layer.weight.device), bench.weights[name])
        for name, layer in bench.layers.items()
    }


def _mask(positions: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[positions] = True
    return mask.reshape(shape)


def _check_off_support(before: dict[str, Tensor], after: dict[str, Tensor], support: dict[str, Tensor]) -> None:
    for name, codes in before.items():
        if not torch.equal(codes[~support[name]], after[name][~support[name]]):
            raise ValueError(f"the edit changed codes of {name} off the support")
