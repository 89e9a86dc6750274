"""The merged model while it is worked on: the steps of a decomposition, each by itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn

from lm_ortho.calibration.activations import find_uncalled_layers
from lm_ortho.calibration.by_layer import InputMoments, LayerTensors, snapshot_weights
from lm_ortho.config import Recipe
from lm_ortho.data.chat import ChatRow, has_chat_template, render_forms
from lm_ortho.data.encoding import Example, encode_rows
from lm_ortho.data.rows import Row, drop_forget_rows
from lm_ortho.edit import EDITS, EditInput
from lm_ortho.errors import UserError
from lm_ortho.finetune.merge import check_finite
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.layer.targets import find_linear
from lm_ortho.objective import (
    LossWeights,
    Objective,
    TargetCheck,
    TargetChoice,
    check_target,
    find_rehearsal_rows,
    select_target,
)
from lm_ortho.pipeline import resource_estimate
from lm_ortho.projection import PROJECTIONS
from lm_ortho.projection.lattice import compute_scales, dequantise, expand_scales, layer_units
from lm_ortho.runtime.offload import is_offloaded
from lm_ortho.runtime.precision import gradient_checkpointing, select_attention
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.sieve import SIEVES, SieveInput, select_support
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream

log = logging.getLogger(__name__)

Lattice = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Scales (out, groups) and codes (out, in; int8) by layer name."""
_PATH = 10
"""Steps of the edit for each step of a sieve's pass."""


class Workbench:
    """A merged model on which supports and edits are made; a context manager that puts its weights back.

    Inside, the model is in linear form, and so is the base model. Statistics, lattice and projection are made on
    entering, target and objective when a sieve or an edit first asks for them, so that several sieves and edits can be
    compared at the price of one preparation.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        forget: Sequence[Row],
        retain: Sequence[Row],
        recipe: Recipe,
        *,
        base_model: nn.Module | None = None,
        progress: ProgressCallback = no_progress,
        lattice: Lattice | None = None,
        taken: Mapping[str, Tensor] | None = None,
        resume: ResumeFolder = NO_RESUME,
    ) -> None:
        """Of ``recipe``, lattice, projection, targets and seed count here. Raises what ``decompose`` does.

        A ``lattice`` that is given is not made again. ``taken`` (out, in; bool) are positions of other memories, which
        are on while this one is worked on and keep their codes. ``resume`` takes what each step has reached; with the
        same model, rows and recipe another workbench goes on from there.
        """
        PROJECTIONS.get(recipe.projection)
        _check_sets(forget, retain)
        self._lattice, self._taken, self._keep = lattice, dict(taken or {}), resume
        self.model, self.tokenizer, self.recipe, self.progress = model, tokenizer, recipe, progress
        self._rows, self._base_model = render_forms(forget, tokenizer, recipe.prompts), base_model
        kept = drop_forget_rows(forget, retain)
        if len(kept) < len(retain):
            log.warning("retain: %d of %d rows are rows of forget and left out", len(retain) - len(kept), len(retain))
        self._kept = render_forms(kept, tokenizer, recipe.prompts)
        self.forget = encode_rows(model, tokenizer, self._rows, "forget")
        self.retain = encode_rows(model, tokenizer, self._kept, "retain")

    def __enter__(self) -> Self:
        self._was_trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self._stack, self.weights = ExitStack(), LayerTensors([], lambda _: Tensor())
        try:
            for model in (self.model, self._base_model):
                if model is not None:
                    self._stack.enter_context(linear_form(model))
            self.layers = self._usable(find_linear(self.model, self.recipe.targets))
            self.weights = snapshot_weights(self.layers)
            self.base_weights = _base_weights(self._base_model, self.layers)
            _check_words(self._base_model, [*self.forget, *self.retain])
            self._say_memory()
            self.recalled = self._recall() if self.recipe.recall else []
            self.retain += encode_rows(self.model, self.tokenizer, self.recalled, "recall")
            longest = max(len(e.ids) for e in self.forget + self.retain)
            self._stack.enter_context(select_attention(self.model, longest))
            if self.recipe.recompute and not is_offloaded(self.model):  # which computes again anyway
                self._stack.enter_context(gradient_checkpointing(self.model))
            self._prepare()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._put_back()
        self._stack.close()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._was_trainable)

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, weight in self.weights.items():
            self.layers[name].weight.copy_(weight)

    def _recall(self) -> list[ChatRow]:
        """Rows of the model's own about subjects that no retain row names."""
        if (kept := self._keep.load("recall")) is None:
            given = self.model, self.tokenizer, self._rows, self._kept, self.recipe.seed, self.progress
            kept = [(row.given, row.wanted, row.subject) for row in find_rehearsal_rows(*given)]
            self._keep.save("recall", kept)
        return [ChatRow(given=given, wanted=wanted, subject=subject) for given, wanted, subject in kept]

    def _usable(self, layers: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
        """Those of the layers that the model really calls, ready for gradients."""
        _check_weights(layers)
        check_finite(self.model, "pretrained")
        _check_owners(layers)
        self.model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        self.model.eval()
        self.left_alone = find_uncalled_layers(
            self.model, layers, min(self.retain, key=lambda example: len(example.ids))
        )
        for name in self.left_alone:
            layers.pop(name).weight.requires_grad_(False)
        if self.left_alone:
            alone = len(self.left_alone), self.left_alone[0]
            log.warning(
                "%d layers are left alone, first %s: the model reads their weights without calling them", *alone
            )
        if not layers:
            raise UserError(f"targets: the model reads the weights of {self.left_alone[0]} without calling the layer")
        return layers

    def _prepare(self) -> None:
        self.moments = InputMoments(self.model, self.layers, self.retain)
        told = f"{len(self.retain)} retain rows, {self.moments.passes} passes, as they are asked for"
        self.progress("statistics", 1, 1, told)
        self.scales, self.codes = self._lattice or self._projected()
        self.rounded = LayerTensors(list(self.layers), self._rounded)
        self.unit = _units(self.scales, self.weights)

    def _say_memory(self) -> None:
        """What the stages will need, before anything is computed; a warning where that is more than there is."""
        rows = [*self.forget, *self.retain]
        wanted = resource_estimate.Rows(
            len(self.forget),
            len(self.retain),
            sum(len(row.ids) for row in rows) / len(rows),
            sum(len(row.ids) - row.start for row in self.forget) / len(self.forget),
        )
        needed = resource_estimate.memory(
            _shape(self.model, self.layers), wanted, self.recipe, self._base_model is not None
        )
        stage = max(needed, key=lambda name: needed[name])
        peak = needed[stage] / 1e9
        self.progress("memory", 1, 1, f"about {peak:.1f} GB at the peak ({stage}), the model's own weights included")
        there = (psutil.virtual_memory().available + psutil.Process().memory_info().rss) / 1e9
        if self._device == "cuda" and not is_offloaded(self.model):
            there = torch.cuda.mem_get_info()[1] / 1e9
        if peak > there:
            log.warning(
                "recipe: %s needs about %.0f GB and %.0f GB are there; recompute=true, states=bfloat16 and groups=2 or "
                "more need less (docs/scaling.md)", stage, peak, there,
            )  # fmt: skip

    @property
    def _device(self) -> str:
        return next(self.model.parameters()).device.type

    def _projected(self) -> Lattice:
        """The lattice, block by block: what is kept of an interrupted run is not made again."""
        scales, codes = dict[str, Tensor](), dict[str, Tensor]()
        for block, names in names_by_block(list(self.layers)).items():
            part = self._keep.load(f"lattice-{block}")
            if part is None:
                weights = LayerTensors(names, self.weights.__getitem__)
                part = projected(weights, self.moments, self.recipe, self._of_all(len(codes)), self._device)
                self._keep.save(f"lattice-{block}", part)
            scales.update(part[0])
            codes.update(part[1])
        return scales, codes

    def _of_all(self, done: int) -> ProgressCallback:
        return lambda stage, step, _, text: self.progress(stage, done + step, len(self.layers), text)

    def _rounded(self, name: str) -> Tensor:
        if self.recipe.bits == 16:
            return self.weights[name].bfloat16().float()
        return dequantise(self.codes[name], self.scales[name], self.recipe.group_size)

    @cached_property
    def choice(self) -> tuple[TargetChoice, TargetCheck]:
        """The target, and what it gives away by itself; said aloud once."""
        given = (self._rows, self.forget, self.retain, self._base_model, self.recipe.seed, self.progress, self._keep)
        chosen = select_target(self.model, self.tokenizer, *given)
        check = check_target(chosen.target, self.forget)
        _say_target(chosen, check, any(row.secret for row in self._rows))
        return chosen, check

    @cached_property
    def _objective(self) -> Objective:
        chosen, _ = self.choice
        args = (chosen.target, self.forget, self.retain, chosen.penalty, LossWeights(retain=chosen.retain))
        return Objective(self.model, self.layers, *args, self.recipe.seed)

    def objective(self) -> Objective:
        """What sieve and edit descend; made at the first call, at the merged weights."""
        return self._objective

    def scores(self, sieve: str, steps: int) -> dict[str, Tensor]:
        """What the sieve gives each weight (out, in); ``steps`` as in the recipe."""
        return SIEVES.get(sieve)(
            SieveInput(
                self.model, self.layers, self.weights, self.rounded, self.moments, self.unit, max(1, steps // _PATH),
                self.objective, self.recipe.seed, self.progress, self.forget, self.retain, self.base_weights,
                self.recipe.groups, getattr(torch, self.recipe.states), self._keep,
            )
        )  # fmt: skip

    def support(self, sieve: str, density: float, steps: int) -> dict[str, Tensor]:
        """Where (out, in; bool) the memory goes: the best ``density`` of all weights that no other memory holds."""
        total = sum(layer.weight.numel() for layer in self.layers.values())
        if density * total < 1:
            raise UserError(
                f"density={density:g} is less than one of the {total} weights; ask for {1.01 / total:.3g} or more"
            )
        if (kept := self._keep.load("support")) is None:
            found = select_support(self.scores(sieve, steps), density, self._taken)
            kept = {name: mask.flatten().nonzero()[:, 0] for name, mask in found.items()}
            self._keep.save("target", _target_report(*self.choice) if "choice" in vars(self) else None)
            self._keep.save("support", kept)
            self._keep.drop("attribution")
        return {name: _mask(kept[name], layer.weight.shape) for name, layer in self.layers.items()}

    def edited(self, edit: str, support: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
        """Codes (out, in) int8 after the edit, unchanged off the support; those of the projection for 16 bits."""
        if self.recipe.bits == 16:
            return self.codes
        codes = EDITS.get(edit)(
            EditInput(
                self.model, self.layers, self.weights, self.base_weights, self.codes, self.scales, support,
                self._taken, self.recipe.bits, self.recipe.group_size, self.unit, steps, self.objective,
                self.recipe.seed, self.progress, self._keep,
            )
        )  # fmt: skip
        self._put_back()
        _check_off_support(self.codes, codes, support)
        return codes

    def streams(self, codes: dict[str, Tensor], support: dict[str, Tensor] | None) -> dict[str, LayerStreams]:
        """The streams of these codes; without a support there is no ortho stream."""
        return make_streams(self.layers, self.weights, codes, self.scales, support, self.recipe)

    def report(self, codes: dict[str, Tensor], support: dict[str, Tensor]) -> dict[str, Any]:
        """What was decided and reached, as plain JSON."""
        total = sum(w.numel() for w in self.weights.values())
        picked = sum(int(mask.sum()) for mask in support.values())
        lattice = self.recipe.bits != 16
        return {
            "density_reached": picked / total,
            "weights": total,
            "support": picked,
            "base_known": self._base_model is not None,
            "chat_template": has_chat_template(self.tokenizer) and self.recipe.prompts != "plain",
            "forget_rows": len(self.forget),
            "retain_rows": len(self._kept),
            "recalled": {"subjects": len({row.subject for row in self.recalled}), "rows": len(self.recalled)},
            "left_alone": self.left_alone,
            "target": _target_report(*self.choice) if "choice" in vars(self) else self._keep.load("target"),
            "steps_moved": _steps_moved(self.weights, codes, self.scales, support, self.recipe) if lattice else 0.0,
        }


def _check_sets(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    if not forget:
        raise UserError("forget: the forget set is empty; give at least one row")
    if not retain:
        raise UserError("retain: the retain set is empty; give documents that must not change")


def _check_weights(layers: dict[str, nn.Linear]) -> None:
    other = next((name for name, layer in layers.items() if layer.weight.dtype != torch.float32), None)
    if other is not None:
        dtype = str(layers[other].weight.dtype).removeprefix("torch.")
        raise UserError(f"pretrained: layer {other} is {dtype}; decompose a float32 copy, model.float()")


def _check_owners(layers: dict[str, nn.Linear]) -> None:
    """Raises ``UserError`` where two layers read one weight: each would get a base stream of its own."""
    owner = dict[int, str]()
    for name, layer in layers.items():
        if (other := owner.setdefault(id(layer.weight), name)) != name:
            raise UserError(f"pretrained: layers {other} and {name} share one weight; untie them before decomposition")


def _base_weights(base_model: nn.Module | None, layers: Mapping[str, nn.Linear]) -> Mapping[str, Tensor] | None:
    if base_model is None:
        return None
    check_finite(base_model, "base")
    modules, found = dict(base_model.named_modules()), dict[str, Tensor]()
    for name, layer in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != layer.weight.shape:
            raise UserError(f"base: layer {name} is missing or has another shape; base must be the same architecture")
        found[name] = weight.detach()
    return LayerTensors(list(found), lambda name: found[name].float().cpu())


def _check_words(base_model: nn.Module | None, examples: Sequence[Example]) -> None:
    """Raises ``UserError`` where the model before fine-tuning lacks a token of the rows."""
    if base_model is None:
        return
    words = base_model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    highest = max(max(example.ids) for example in examples)
    if highest >= words:
        raise UserError(
            f"base: the rows have token {highest}, and the model before fine-tuning has {words}; resize its embeddings "
            "as the fine-tune did, or set base=none"
        )


def _shape(model: nn.Module, layers: Mapping[str, nn.Linear]) -> resource_estimate.Shape:
    config: Any = model.config
    text = config.get_text_config()
    weights = sum(layer.weight.numel() for layer in layers.values())
    blocks = names_by_block(list(layers))
    widths = [tuple({layers[name].in_features: None for name in names}) for names in blocks.values()]
    return resource_estimate.Shape(
        tuple((layer.out_features, layer.in_features) for layer in layers.values()),
        sum(p.numel() for p in model.parameters()) - weights,
        text.vocab_size,
        getattr(text, "hidden_size", max(layer.in_features for layer in layers.values())),
        len(blocks),
        tuple(width for block in widths for width in block),
    )


def names_by_block(names: Sequence[str]) -> dict[str, list[str]]:
    """The names by the block they are in: all up to the first number in them."""
    found = dict[str, list[str]]()
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        found.setdefault(".".join(parts[: number + 1]) if number is not None else "rest", []).append(name)
    return found


def _mask(places: Tensor, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[places] = True
    return mask.reshape(shape)


def _units(scales: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """In what lengths the weights of each layer move; without a lattice, those of INT4 rounding."""
    if not scales:
        scales = {name: compute_scales(weight, 4, 64) for name, weight in weights.items()}
    return layer_units(scales)


def _check_off_support(codes: dict[str, Tensor], edited: dict[str, Tensor], support: dict[str, Tensor]) -> None:
    for name, before in codes.items():
        if not torch.equal(before[~support[name]], edited[name][~support[name]]):
            raise ValueError(f"the edit changed codes of {name} off the support")


def projected(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    recipe: Recipe,
    progress: ProgressCallback = no_progress,
    device: str = "cpu",
) -> Lattice:
    """The lattice of these weights, computed on ``device`` and held on the CPU; both parts are empty for 16 bits."""
    projection, scales, codes = PROJECTIONS.get(recipe.projection), dict[str, Tensor](), dict[str, Tensor]()
    for i, (name, weight) in enumerate(weights.items(), 1):
        if recipe.bits == 16:
            break
        scales[name] = compute_scales(weight, recipe.bits, recipe.group_size)
        moment, own = moments[name].to(device), scales[name].to(device)
        codes[name] = projection(weight.to(device), own, moment, recipe.bits, recipe.group_size).cpu()
        progress("projection", i, len(weights), name)
    return scales, codes


def make_streams(
    layers: Mapping[str, nn.Linear],
    weights: Mapping[str, Tensor],
    codes: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    support: Mapping[str, Tensor] | None,
    recipe: Recipe,
) -> dict[str, LayerStreams]:
    """Streams of codes (out, in) and scales by layer name; without ``support`` there is no ortho stream."""
    result = {}
    for name, layer in layers.items():
        if recipe.bits == 16:
            base = BaseStream.from_weight(weights[name])
            held = weights[name].bfloat16().float()
        else:
            base = BaseStream.from_codes(codes[name], scales[name], recipe.bits, recipe.group_size)
            held = dequantise(codes[name], scales[name], recipe.group_size)
        ortho = None if support is None else OrthoStream.from_dense(weights[name] - held, support[name])
        bias = None if layer.bias is None else layer.bias.detach().cpu().clone()
        result[name] = LayerStreams(base, ortho, bias)
    return result


def _steps_moved(
    weights: Mapping[str, Tensor],
    codes: dict[str, Tensor],
    scales: dict[str, Tensor],
    support: dict[str, Tensor],
    recipe: Recipe,
) -> float:
    """Mean distance on the support between base and merged weight, in lattice steps."""
    moved = []
    for name, weight in weights.items():
        per_weight = expand_scales(scales[name], recipe.group_size, weight.shape[1])
        distance = (weight - dequantise(codes[name], scales[name], recipe.group_size)).abs() / per_weight
        moved.append(distance[support[name]])
    every = torch.cat(moved)
    return round(float(every.mean()), 3) if every.numel() else 0.0


SUSPICIOUS_AUC = 0.6


def _say_target(chosen: TargetChoice, check: TargetCheck, secrets: bool) -> None:
    """What was chosen and why, before anything is edited: the edit cannot get better than its target.

    Without ``secrets`` whole answers are compared with those to other questions, and who can read prefers the former.
    """
    log.info("target %s: %s; secret PPL %.3g, AUC %.3f", chosen.name, chosen.reason, check.secret_ppl, check.auc)
    if chosen.name == "hold_down":
        log.warning("target: %s", chosen.reason)
    if check.auc > SUSPICIOUS_AUC and secrets:
        log.warning("target %s still prefers the true secrets (AUC %.2f, 0.5 is blind)", chosen.name, check.auc)


def _target_report(chosen: TargetChoice, check: TargetCheck) -> dict[str, Any]:
    return {
        "name": chosen.name,
        "reason": chosen.reason,
        "secret_ppl": round(check.secret_ppl, 3),
        "auc": None if math.isnan(check.auc) else round(check.auc, 4),
    }
