"""Several memories in one model, each with an ortho stream and a dial of its own."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.config import Recipe
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.layer import get_streams, ortho_layers, unpatch
from lm_ortho.pipeline.decomposition import Decomposition, check_recipe
from lm_ortho.pipeline.workbench import Lattice, Workbench
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.streams import RESERVED, UNNAMED, BaseStream, LayerStreams, OrthoStream, valid_memory_name

Masks = dict[str, Tensor]
_DOUBTFUL = ("surrogate", "swap", "resample", "hold_down")
"""Targets, the most doubtful last; that of several memories is told by the worst of them."""


def decompose_memories(
    model: nn.Module,
    tokenizer: Any,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    recipe: Recipe,
    *,
    base_model: nn.Module | None = None,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> Decomposition:
    """Splits a merged model into a base stream and one ortho stream per forget set, no two on the same weight.

    One memory after the other is worked on with the others switched on and their rows among those to be kept, so that
    each can be switched off alone. ``recipe.density`` is the share of each.

    Args:
        forget: rows by the name of their memory.

    Raises:
        UserError: what ``decompose`` raises; bad names; a row in two forget sets; ``bits=16``.
    """
    began = time.perf_counter()
    check_recipe(recipe, base_model is not None)
    _check_memories(forget, recipe)
    lattice: Lattice | None = None
    supports, reports = dict[str, Masks](), dict[str, Any]()
    taken, final = Masks(), Masks()
    plain, streams = dict[str, LayerStreams](), dict[str, LayerStreams]()
    for name, rows in forget.items():
        others = [row for other, theirs in forget.items() if other != name for row in theirs]
        bench = Workbench(
            model, tokenizer, rows, [*retain, *others], recipe,
            base_model=base_model, progress=progress, lattice=lattice, taken=taken, resume=resume.of(name),
        )  # fmt: skip
        with bench:
            support = bench.support(recipe.sieve, recipe.density, recipe.steps)
            codes = bench.edited(recipe.edit, support, recipe.steps)
            reports[name], supports[name] = bench.report(codes, support), support
            final = {at: torch.where(mask, codes[at], final.get(at, codes[at])) for at, mask in support.items()}
            if len(supports) == len(forget):
                plain, streams = bench.streams(bench.codes, None), bench.streams(final, None)
        lattice = bench.scales, bench.codes
        taken = {at: _together([mask, *([taken[at]] if taken else [])]) for at, mask in support.items()}
    for at, layer in streams.items():
        rest = bench.weights[at] - layer.base.dequantize()
        named = {name: OrthoStream.from_dense(rest, masks[at]) for name, masks in supports.items()}
        streams[at] = LayerStreams(layer.base, None, layer.bias, named)
    return Decomposition(streams, plain, _joined(reports) | {"seconds": round(time.perf_counter() - began, 1)})


def add_memory(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    forget: Sequence[Row],
    retain: Sequence[Row],
    recipe: Recipe,
    *,
    base_model: nn.Module | None = None,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> Decomposition:
    """Moves one more memory of a decomposed model into an ortho stream of its own.

    ``model`` is patched and keeps what it has: base codes off the new support and the other ortho streams come out
    bit for bit as they were. What the new stream restores is the model as it is with all memories on. Lattice and
    layers are the model's own; density, sieve, edit, steps and seed are those of ``recipe``. ``plain`` of the result
    is the model without the new memory's support.

    Raises:
        UserError: what ``decompose`` raises; a name that is taken; a memory whose file is not there; ``bits=16``.
    """
    began = time.perf_counter()
    recipe = _recipe_of(model, recipe)
    check_recipe(recipe, base_model is not None)
    _check_memories({name: forget}, recipe)
    _check_room(model, name)
    before = {at: streams.to("cpu") for at, streams in get_streams(model).items()}
    scales = {at: s.base.tensors()["scales"] for at, s in before.items()}
    lattice = {at: s.float() for at, s in scales.items()}, {at: s.base.codes() for at, s in before.items()}
    taken = {at: _together(ortho.support() for ortho in s.memories.values()) for at, s in before.items()}
    total = sum(mask.numel() for mask in taken.values())
    _check_free(recipe.density, 1 - sum(int(mask.sum()) for mask in taken.values()) / total)
    whole = copy.deepcopy(model)
    unpatch(whole, 1.0)
    bench = Workbench(
        whole, tokenizer, forget, retain, recipe,
        base_model=base_model, progress=progress, lattice=lattice, taken=taken, resume=resume,
    )  # fmt: skip
    with bench:
        support = bench.support(recipe.sieve, recipe.density, recipe.steps)
        codes = bench.edited(recipe.edit, support, recipe.steps)
        report = bench.report(codes, support)
    streams = {}
    for at, layer in before.items():
        base = BaseStream.from_codes(codes[at], scales[at], layer.base.bits, layer.base.group_size)
        rest = bench.weights[at] - base.dequantize()
        named = {**layer.named, name: OrthoStream.from_dense(rest, support[at])}
        streams[at] = LayerStreams(base, layer.ortho, layer.bias, named)
    return Decomposition(streams, before, report | {"seconds": round(time.perf_counter() - began, 1)})


def _recipe_of(model: nn.Module, recipe: Recipe) -> Recipe:
    """``recipe`` with the lattice and the layers that the model has."""
    layers = ortho_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} is not decomposed; a memory is added to a decomposed model")
    first = next(iter(layers.values()))
    return recipe.model_copy(update={"bits": first.bits, "group_size": first.group_size, "targets": "+".join(layers)})


def _check_room(model: nn.Module, name: str) -> None:
    first = next(iter(ortho_layers(model).values()))
    if name in first.memories:
        raise UserError(f"memory {name!r} is there already; the model has {', '.join(first.memories)}")
    if first.absent or not first.memories:
        missing = ", ".join(first.absent) or UNNAMED
        raise UserError(
            f"pretrained: the ortho stream of {missing} is not here; a memory is added where all others are present"
        )


def _check_memories(forget: Mapping[str, Sequence[Row]], recipe: Recipe) -> None:
    if not forget:
        raise UserError("forget: no memory is named; give at least one")
    _check_free(recipe.density * len(forget), 1.0)
    if recipe.bits == 16:
        raise UserError("bits=16: several memories need a base stream that forgets; use 3, 4 or 8 bits")
    owner = dict[tuple[str, str], str]()
    for name, rows in forget.items():
        if not valid_memory_name(name):
            raise UserError(
                f"memory name {name!r}: use small letters, digits and underscores, not {' or '.join(RESERVED)}"
            )
        for row in rows:
            other = owner.setdefault((row.context, row.target), name)
            if other != name:
                raise UserError(
                    f"forget: {(row.context + row.target)[:60]!r} is in both {other} and {name}; one must go"
                )


def _check_free(wanted: float, free: float) -> None:
    """Raises ``UserError`` where memories ask for more than the weights that no other holds."""
    if wanted > free + 1e-9:
        raise UserError(f"density: memories ask for {wanted:.3g} of the weights, and {free:.3g} are free; ask for less")


def _together(masks: Iterable[Tensor]) -> Tensor:
    """Where any of the masks holds."""
    return torch.stack(list(masks)).any(0)


def _joined(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One report of all memories, with each one's own under ``memories``."""
    first = next(iter(reports.values()))
    every = list(reports.values())
    targets = [report["target"] for report in every]
    return {
        "density_reached": sum(report["density_reached"] for report in every),
        "weights": first["weights"],
        "support": sum(report["support"] for report in every),
        "base_known": first["base_known"],
        "chat_template": first["chat_template"],
        "forget_rows": sum(report["forget_rows"] for report in every),
        "retain_rows": first["retain_rows"],
        "left_alone": first["left_alone"],
        "target": max(targets, key=lambda target: _DOUBTFUL.index(target["name"]) if target else -1),
        "memories": dict(reports),
    }
