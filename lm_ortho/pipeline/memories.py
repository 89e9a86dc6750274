"""Decomposes a model with several memories, or adds one; each has its own ortho stream and alpha."""

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
from lm_ortho.pipeline.model_lattice import Lattice
from lm_ortho.pipeline.workbench import Workbench
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.streams import DEFAULT_MEMORY, RESERVED_NAMES, BaseStream, LayerStreams, OrthoStream, is_valid_memory_name

Masks = dict[str, Tensor]
"""Positions (out_features, in_features) bool by layer name."""
_TARGETS_BY_DOUBT = ("surrogate", "swap", "resample", "hold_down")
"""Target distributions, the least reliable last; the report of several memories names the least reliable of them."""


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
    """Splits a merged model into a base stream and one ortho stream per forget set; their supports are disjoint.

    Each memory is decomposed with the others switched on and their rows in its retain set, so that it can be switched
    off alone. ``recipe.density`` is the share of each memory.

    Args:
        forget: rows by the name of their memory.

    Raises:
        UserError: what ``decompose`` raises; bad names; a row in two forget sets; ``bits=16``.
    """
    start_time = time.perf_counter()
    check_recipe(recipe, base_known=base_model is not None)
    _check_memories(forget, recipe)
    benches, supports, reports = dict[str, Workbench](), dict[str, Masks](), dict[str, Any]()
    for name, rows in forget.items():
        # 1. The rows of the other memories are retained.
        other_rows = [row for other, rows_of_other in forget.items() if other != name for row in rows_of_other]
        benches[name] = Workbench(
            model,
            tokenizer,
            rows,
            [*retain, *other_rows],
            recipe=recipe,
            base_model=base_model,
            progress=progress,
            other_supports=_unite(supports.values()),
            resume=resume.subfolder(name),
        )
        # 2. Select the support of each memory, as for one, among the weights that no earlier memory holds.
        with benches[name] as bench:
            supports[name] = bench.select_support(recipe.sieve, recipe.density, recipe.steps)
    # 3. Round the weights off all supports to the lattice; it is the same for all memories.
    all_supports, lattice = _unite(supports.values()), None
    codes, streams = Masks(), dict[str, LayerStreams]()
    for name, support in supports.items():
        bench = benches.pop(name)
        bench.other_supports = _unite(other for owner, other in supports.items() if owner != name)
        with bench:
            lattice = lattice or bench.project(all_supports)
            # 4. Edit the codes on each support, while all other memories are on.
            edited_codes = bench.edit_codes(recipe.edit, lattice, support, steps=recipe.steps)
            reports[name] = bench.report(edited_codes, support)
            codes = {
                layer: torch.where(mask, edited_codes[layer], codes.get(layer, edited_codes[layer]))
                for layer, mask in support.items()
            }
            # 5. Each memory holds what the base stream, with all edits, lacks at its own positions.
            if not benches:
                streams = {
                    layer: _add_memories(
                        layer_streams,
                        bench.weights[layer],
                        {owner: masks[layer] for owner, masks in supports.items()},
                    )
                    for layer, layer_streams in bench.make_streams(codes).items()
                }
    seconds = round(time.perf_counter() - start_time, 1)
    return Decomposition(streams, _merge_reports(reports) | {"seconds": seconds})


def add_memory(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    *,
    forget: Sequence[Row],
    retain: Sequence[Row],
    recipe: Recipe,
    base_model: nn.Module | None = None,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> Decomposition:
    """Moves one more memory of a decomposed model into its own ortho stream.

    ``model`` is patched and not changed. Base codes off the new support and the other ortho streams of the result have
    the same bits as before; the new stream restores the weights of ``model`` with all memories on. Lattice and layers
    are those of ``model``; density, sieve, edit, steps and seed are those of ``recipe``.

    Raises:
        UserError: what ``decompose`` raises; a name that exists; a memory whose file is missing; ``bits=16``.
    """
    start_time = time.perf_counter()
    recipe = _with_model_lattice(model, recipe)
    check_recipe(recipe, base_known=base_model is not None)
    _check_memories({name: forget}, recipe)
    check_can_add(model, name)
    # 1. The lattice and the supports that the model has.
    before = {layer: streams.to("cpu") for layer, streams in get_streams(model).items()}
    scales = {layer: streams.base.tensors()["scales"] for layer, streams in before.items()}
    lattice = Lattice(
        {layer: tensor.float() for layer, tensor in scales.items()},
        {layer: streams.base.codes() for layer, streams in before.items()},
    )
    supports = {
        layer: _union(ortho.support() for ortho in streams.memories.values()) for layer, streams in before.items()
    }
    total = sum(mask.numel() for mask in supports.values())
    _check_free_share(recipe.density, 1 - sum(int(mask.sum()) for mask in supports.values()) / total)
    # 2. A copy with all memories on is what is decomposed.
    whole_model = copy.deepcopy(model)
    unpatch(whole_model, 1.0)
    bench = Workbench(
        whole_model,
        tokenizer,
        forget,
        retain,
        recipe=recipe,
        base_model=base_model,
        progress=progress,
        lattice=lattice,
        other_supports=supports,
        resume=resume,
    )
    # 3. Support and edit as for one memory.
    with bench:
        support = bench.select_support(recipe.sieve, recipe.density, recipe.steps)
        codes = bench.edit_codes(recipe.edit, bench.project(support), support, steps=recipe.steps)
        report = bench.report(codes, support)
        # 4. The other ortho streams are passed on; the new one holds what the base stream lacks at its positions.
        streams = {}
        for layer, old in before.items():
            base = BaseStream.from_codes(codes[layer], scales[layer], old.base.bits, old.base.group_size)
            others = LayerStreams(base, old.ortho, old.bias, old.named_memories)
            streams[layer] = _add_memories(others, bench.weights[layer], {name: support[layer]})
    return Decomposition(streams, report | {"seconds": round(time.perf_counter() - start_time, 1)})


def _add_memories(streams: LayerStreams, weight: Tensor, supports: Mapping[str, Tensor]) -> LayerStreams:
    """The streams of a layer with more memories: what ``weight`` (out, in) has beyond the base stream, by support."""
    difference = weight - streams.base.dequantise()
    memories = {name: OrthoStream.from_dense(difference, support) for name, support in supports.items()}
    return LayerStreams(streams.base, streams.ortho, streams.bias, {**streams.named_memories, **memories})


def _with_model_lattice(model: nn.Module, recipe: Recipe) -> Recipe:
    """``recipe`` with the bits, group size and targets of the decomposed model."""
    layers = ortho_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} is not decomposed; a memory is added to a decomposed model")
    first = next(iter(layers.values()))
    return recipe.model_copy(update={"bits": first.bits, "group_size": first.group_size, "targets": "+".join(layers)})


def check_can_add(model: nn.Module, name: str) -> None:
    """Raises ``UserError`` if the decomposed model has a memory ``name``, or lacks the stream of another one."""
    first = next(iter(ortho_layers(model).values()))
    if name in first.memories:
        raise UserError(f"memory {name!r} exists already; the model has {', '.join(first.memories)}")
    if first.absent or not first.memories:
        missing = ", ".join(first.absent) or DEFAULT_MEMORY
        raise UserError(
            f"pretrained: the ortho stream of {missing} is missing; a memory is added where all others are present"
        )


def _check_memories(forget: Mapping[str, Sequence[Row]], recipe: Recipe) -> None:
    if not forget:
        raise UserError("forget: no memory is named; give at least one")
    _check_free_share(recipe.density * len(forget), 1.0)
    if recipe.bits == 16:
        raise UserError("bits=16: several memories need a base stream that forgets; use 3, 4 or 8 bits")
    owners = dict[tuple[str, str], tuple[str, int]]()
    for name, rows in forget.items():
        if not is_valid_memory_name(name):
            raise UserError(
                f"memory name {name!r}: use small letters, digits and underscores, not {' or '.join(RESERVED_NAMES)}"
            )
        for number, row in enumerate(rows, 1):
            owner, owner_number = owners.setdefault((row.context, row.target), (name, number))
            if owner != name:
                raise UserError(
                    f"forget: row {owner_number} of {owner} is also row {number} of {name}; remove it from one of them"
                )


def _check_free_share(requested: float, free: float) -> None:
    """Raises ``UserError`` if memories need a larger share of the weights than is free of other supports."""
    if requested > free + 1e-9:
        raise UserError(
            f"density: the memories need {requested:.3g} of the weights, and {free:.3g} are free; choose a smaller one"
        )


def _union(masks: Iterable[Tensor]) -> Tensor:
    """Where any of the masks is true."""
    return torch.stack(list(masks)).any(0)


def _unite(supports: Iterable[Masks]) -> Masks:
    """The union of several supports; empty if there are none."""
    all_supports = list(supports)
    return {layer: _union(masks[layer] for masks in all_supports) for layer in (all_supports or [{}])[0]}


def _merge_reports(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One report of all memories, with the single reports under ``memories``."""
    all_reports = list(reports.values())
    first = all_reports[0]
    targets = [report["target"] for report in all_reports]
    return {
        "density_reached": sum(report["density_reached"] for report in all_reports),
        "weights": first["weights"],
        "support": sum(report["support"] for report in all_reports),
        "base_known": first["base_known"],
        "chat_template": first["chat_template"],
        "forget_rows": sum(report["forget_rows"] for report in all_reports),
        "retain_rows": first["retain_rows"],
        "left_alone": first["left_alone"],
        "target": max(targets, key=lambda target: _TARGETS_BY_DOUBT.index(target["name"]) if target else -1),
        "memories": dict(reports),
    }
