"""The one function that goes through the steps of a decomposition in order."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.documents import Row
from lm_ortho.calibration.examples import Example, encode
from lm_ortho.calibration.precision import attention_for
from lm_ortho.edit import EDITS, EditInput
from lm_ortho.errors import UserError
from lm_ortho.implant.lora import Notify
from lm_ortho.layer.targets import find_linear
from lm_ortho.projection import PROJECTIONS
from lm_ortho.projection.lattice import group_scales, spread, values
from lm_ortho.settings import Recipe
from lm_ortho.sieve import SIEVES, SieveInput, select_support
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream
from lm_ortho.target import Choice, Objective, TargetCheck, Weights, check_target, choose_target

log = logging.getLogger(__name__)

_PATH = 10
"""Steps of the edit for each step of a sieve's pass."""
MAX_TOKENS = 512


def _silent(stage: str, done: int, total: int, text: str) -> None:
    """Reports nothing."""


@dataclass(frozen=True)
class Decomposition:
    """Streams by layer name, plain rounding of the same lattice without support, and what was decided and why."""

    streams: dict[str, LayerStreams]
    plain: dict[str, LayerStreams]
    report: dict[str, Any]


def decompose(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    recipe: Recipe,
    *,
    base_model: nn.Module | None = None,
    notify: Notify = _silent,
) -> Decomposition:
    """Splits the linear layers of a merged model into a base stream and an ortho stream.

    Args:
        model: the merged model in float32 (BF16-representable weights); its weights are the same afterwards.
        forget: what alpha=0 must not know.
        retain: documents that must not change, some of the same form as ``forget`` about others.
        base_model: the model before fine-tuning, if it is known; decides the target.
        notify: called with stage, step, steps, text.

    Raises:
        UserError: for an unknown sieve, projection or edit, empty or identical sets, NaN weights.
    """
    sieve, projection, edit = (
        SIEVES.get(recipe.sieve),
        PROJECTIONS.get(recipe.projection),
        EDITS.get(recipe.edit),
    )
    _check_sets(forget, retain)
    if recipe.bits == 16 and recipe.edit != "none":
        raise UserError(f"bits=16 passes weights through, so edit={recipe.edit!r} cannot be used; use edit=none")
    if recipe.sieve == "oracle" and recipe.edit != "w0":
        raise UserError(f"edit={recipe.edit!r}: sieve=oracle looks at the way back to W0; use it with edit=w0")
    began = time.perf_counter()
    layers = find_linear(model, recipe.targets)
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    _check_finite(weights)
    before = _base_weights(base_model, layers)
    was_trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    model.eval()
    exit_stack = ExitStack()
    try:
        longest = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS))
        forget_examples = _encode_forget(tokenizer, forget, longest)
        retain_examples = encode(tokenizer, retain, longest)
        exit_stack.enter_context(attention_for(model, max(len(e.ids) for e in forget_examples + retain_examples)))
        moments = input_moments(model, layers, retain_examples)
        notify("statistics", 1, 1, f"{len(layers)} layers, {len(retain)} retain rows")
        scales, codes, rounded = {}, {}, {}
        for i, (name, weight) in enumerate(weights.items(), 1):
            if recipe.bits == 16:
                rounded[name] = weight.bfloat16().float()
                continue
            scales[name] = group_scales(weight, recipe.bits, recipe.group_size)
            codes[name] = projection(weight, scales[name], moments[name], recipe.bits, recipe.group_size)
            rounded[name] = values(codes[name], scales[name], recipe.group_size)
            notify("projection", i, len(weights), name)
        step = _mean_step(scales, weights)

        @cache
        def choice() -> tuple[Choice, TargetCheck]:
            given = (forget, forget_examples, retain_examples, base_model, recipe.seed, notify)
            chosen = choose_target(model, tokenizer, *given)
            check = check_target(chosen.target, forget_examples)
            _say_target(chosen, check)
            return chosen, check

        @cache
        def objective() -> Objective:
            chosen, _ = choice()
            loss = (chosen.penalty, Weights(retain=chosen.retain))
            args = (chosen.target, forget_examples, retain_examples, *loss, recipe.seed)
            return Objective(model, layers, *args)

        given = SieveInput(
            model, layers, weights, rounded, moments, step, max(1, recipe.steps // _PATH), objective, recipe.seed,
            notify, forget_examples, retain_examples, before,
        )  # fmt: skip
        support = select_support(sieve(given), recipe.density)
        edited = codes
        if recipe.bits != 16:
            edited = edit(
                EditInput(
                    model, layers, weights, before, codes, scales, support, recipe.bits, recipe.group_size,
                    step, recipe.steps, objective, recipe.seed, notify,
                )
            )  # fmt: skip
            _check_off_support(codes, edited, support)
        built = _streams(layers, weights, edited, scales, support, recipe)
        plain = _streams(layers, weights, codes, scales, None, recipe)
    finally:
        exit_stack.close()
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(weights[name])
        model.requires_grad_(False)
        for parameter in was_trainable:
            parameter.requires_grad_(True)
    total = sum(w.numel() for w in weights.values())
    picked = sum(int(mask.sum()) for mask in support.values())
    report: dict[str, Any] = {
        "density_reached": picked / total,
        "weights": total,
        "support": picked,
        "seconds": round(time.perf_counter() - began, 1),
        "base_known": base_model is not None,
        "forget_rows": len(forget),
        "retain_rows": len(retain),
        "target": _target_report(*choice()) if choice.cache_info().currsize else None,
        "steps_moved": _steps_moved(weights, edited, scales, support, recipe) if recipe.bits != 16 else 0.0,
    }
    return Decomposition(built, plain, report)


def _check_sets(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    if not forget:
        raise UserError("forget: the forget set is empty; give at least one row")
    if not retain:
        raise UserError("retain: the retain set is empty; give documents that must not change")
    wanted, kept = ({(row.context, row.target) for row in rows} for rows in (forget, retain))
    if wanted == kept:
        raise UserError("forget and retain are the same set: nothing can be both forgotten and kept")


def _encode_forget(tokenizer: Any, forget: Sequence[Row], longest: int) -> list[Example]:
    """One example per row, each with something left to predict."""
    examples = encode(tokenizer, forget, longest)
    if any(e.start >= len(e.ids) for e in examples):
        raise UserError(f"forget: a row has no token to forget within its first {longest} tokens")
    return examples


def _check_finite(weights: dict[str, Tensor]) -> None:
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise UserError(f"pretrained: {len(bad)} layers hold NaN or infinite weights, first {bad[0]}")


def _base_weights(base_model: nn.Module | None, layers: dict[str, nn.Linear]) -> dict[str, Tensor] | None:
    if base_model is None:
        return None
    modules = dict(base_model.named_modules())
    result = {}
    for name, layer in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != layer.weight.shape:
            raise UserError(f"base: layer {name} is missing or has another shape; base must be the same architecture")
        result[name] = weight.detach().float()
    return result


def _mean_step(scales: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    """The mean lattice step; without a lattice, what INT4 rounding of the weights would have."""
    if not scales:
        scales = {name: group_scales(weight, 4, 64) for name, weight in weights.items()}
    return float(torch.cat([s.flatten() for s in scales.values()]).mean())


def _check_off_support(codes: dict[str, Tensor], edited: dict[str, Tensor], support: dict[str, Tensor]) -> None:
    for name, before in codes.items():
        if not torch.equal(before[~support[name]], edited[name][~support[name]]):
            raise ValueError(f"the edit changed codes of {name} off the support")


def _streams(
    layers: dict[str, nn.Linear],
    weights: dict[str, Tensor],
    codes: dict[str, Tensor],
    scales: dict[str, Tensor],
    support: dict[str, Tensor] | None,
    recipe: Recipe,
) -> dict[str, LayerStreams]:
    result = {}
    for name, layer in layers.items():
        if recipe.bits == 16:
            base = BaseStream.from_weight(weights[name])
            held = weights[name].bfloat16().float()
        else:
            base = BaseStream.from_codes(codes[name], scales[name], recipe.bits, recipe.group_size)
            held = values(codes[name], scales[name], recipe.group_size)
        ortho = None if support is None else OrthoStream.from_dense(weights[name] - held, support[name])
        bias = None if layer.bias is None else layer.bias.detach().clone()
        result[name] = LayerStreams(base, ortho, bias)
    return result


def _steps_moved(
    weights: dict[str, Tensor],
    codes: dict[str, Tensor],
    scales: dict[str, Tensor],
    support: dict[str, Tensor],
    recipe: Recipe,
) -> float:
    """Mean distance on the support between base and merged weight, in lattice steps."""
    moved = []
    for name, weight in weights.items():
        per_weight = spread(scales[name], recipe.group_size, weight.shape[1])
        distance = (weight - values(codes[name], scales[name], recipe.group_size)).abs() / per_weight
        moved.append(distance[support[name]])
    every = torch.cat(moved)
    return round(float(every.mean()), 3) if every.numel() else 0.0


SUSPICIOUS_AUC = 0.6


def _say_target(chosen: Choice, check: TargetCheck) -> None:
    """What was chosen and why, before anything is edited: the edit cannot get better than its target."""
    log.info("target %s: %s; secret PPL %.3g, AUC %.3f", chosen.name, chosen.reason, check.secret_ppl, check.auc)
    if chosen.name == "hold_down":
        log.warning("target: %s", chosen.reason)
    if check.auc > SUSPICIOUS_AUC:
        log.warning("target %s still prefers the true secrets (AUC %.2f, 0.5 is blind)", chosen.name, check.auc)


def _target_report(chosen: Choice, check: TargetCheck) -> dict[str, Any]:
    return {
        "name": chosen.name,
        "reason": chosen.reason,
        "secret_ppl": round(check.secret_ppl, 3),
        "auc": None if math.isnan(check.auc) else round(check.auc, 4),
    }
