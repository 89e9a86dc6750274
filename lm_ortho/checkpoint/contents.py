"""The contents of a checkpoint, counted from its files one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lm_ortho.checkpoint.manifest import Manifest, ortho_file
from lm_ortho.checkpoint.read import list_memories
from lm_ortho.checkpoint.tensor_files import ORTHO_PARTS, TensorFiles, check_base, read_base, read_memories
from lm_ortho.checkpoint.verification import read_base_files, verify_checkpoint
from lm_ortho.errors import UserError
from lm_ortho.layer import OrthoLinear, ortho_layers
from lm_ortho.streams import DEFAULT_MEMORY, LayerStreams


@dataclass(frozen=True)
class LayerContents:
    """One decomposed layer of a checkpoint.

    Attributes:
        name: dotted name of the module.
        shape: (out_features, in_features).
        values: number of values in the ortho stream; None in a base-only checkpoint.
        density: ``values`` per weight; None in a base-only checkpoint.
        relative_error: ||W_ortho||_F / ||W(1)||_F, the distance of the base stream from alpha=1; None in a base-only
            checkpoint and where the file of a memory is missing.
        zeros: number of codes that are 0; None at 16 bits, which have no codes.
        bytes: bytes of both streams.
        bits_per_weight: stored bits per weight of both streams.
    """

    name: str
    shape: tuple[int, int]
    values: int | None
    density: float | None
    relative_error: float | None
    zeros: int | None
    bytes: int
    bits_per_weight: float

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint: its layers, totals over them, and the size of its parts in bytes.

    ``memories`` maps each memory whose file is present to its number of values, ``missing`` lists the other memories;
    while one is missing, alpha=1 cannot be computed and errors are None. ``bytes`` has ``base`` and ``ortho`` (the
    streams), ``other`` (biases and all that is not decomposed) and ``files`` (all files of the checkpoint).
    """

    directory: str
    has_ortho: bool
    bits: int
    group_size: int
    weights: int
    density: float | None
    relative_error: float | None
    zero_codes: float | None
    bits_per_weight: float
    memories: dict[str, int]
    missing: list[str]
    bytes: dict[str, int]
    layers: list[LayerContents]
    meta: dict[str, Any]


def read_contents(directory: str | PathLike[str], *, trust_remote_code: bool = False) -> CheckpointContents:
    """Reads the contents of a checkpoint, without building the model in memory. Every file is verified first.

    Raises:
        UserError: for a directory that is no checkpoint, for damaged files and for streams that do not fit.
    """
    from lm_ortho.checkpoint.hf import build_skeleton  # imports transformers

    # 1. Verify the files, and take names and shapes of the layers from a model on the meta device.
    path = Path(directory)
    manifest = verify_checkpoint(path, trust_remote_code=trust_remote_code)
    present = [name for name in list_memories(path) if (path / ortho_file(name)).exists()]
    is_complete = len(present) == len(list_memories(path))
    model = build_skeleton(path, trust_remote_code=trust_remote_code)
    skeleton = ortho_layers(model)
    # 2. Check all tensors, then read and describe one layer after the other.
    layers, squared_norms = [], []
    with ExitStack() as stack:
        base = stack.enter_context(TensorFiles(path, read_base_files(path, manifest)))
        memories = {name: stack.enter_context(TensorFiles(path, [ortho_file(name)])) for name in present}
        check_base(model, base)
        counts = dict.fromkeys(present, 0)
        for name, layer in skeleton.items():
            streams = _read_streams(name, layer, base, memories)
            for memory, ortho in streams.memories.items():
                counts[memory] += ortho.nnz
            squared_norms.append(_squared_norms(streams))
            layers.append(_describe_layer(name, streams, squared_norms[-1], is_complete))
        stored = [
            (name, tensor.nbytes) for files in (base, *memories.values()) for name, tensor in files.tensors.items()
        ]
        sizes = _count_bytes(path, manifest, stored, skeleton)
    # 3. Add up the totals.
    first = next(iter(skeleton.values()))
    weights = sum(layer.weights for layer in layers)
    ortho_square, full_square = (sum(part) for part in zip(*squared_norms, strict=True))
    return CheckpointContents(
        directory=str(path),
        has_ortho=bool(counts),
        bits=first.bits,
        group_size=first.group_size,
        weights=weights,
        density=sum(layer.values or 0 for layer in layers) / weights if counts else None,
        relative_error=_norm_ratio(ortho_square, full_square) if counts and is_complete else None,
        zero_codes=sum(layer.zeros or 0 for layer in layers) / weights if first.bits != 16 else None,
        bits_per_weight=8 * (sizes["base"] + sizes["ortho"]) / weights,
        memories=counts,
        missing=[name for name in list_memories(path) if name not in counts],
        bytes=sizes,
        layers=layers,
        meta=manifest.meta,
    )


def _read_streams(
    name: str, layer: OrthoLinear, base: TensorFiles, memories: Mapping[str, TensorFiles]
) -> LayerStreams:
    streams = read_memories(memories, name, layer)
    try:
        return LayerStreams(read_base(base, name, layer), streams.pop(DEFAULT_MEMORY, None), None, streams)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{base.directory}: streams of {name} do not fit: {error}") from None


def _squared_norms(streams: LayerStreams) -> tuple[float, float]:
    """||W_ortho||_F^2 and ||W(1)||_F^2; zeros without an ortho stream."""
    if not streams.memories:
        return 0.0, 0.0
    ortho_square = sum(float(ortho.vals.double().square().sum()) for ortho in streams.memories.values())
    return ortho_square, float(streams.to_dense(1.0).double().square().sum())


def _describe_layer(
    name: str, streams: LayerStreams, squared_norms: tuple[float, float], is_complete: bool
) -> LayerContents:
    has_ortho = bool(streams.memories)
    return LayerContents(
        name=name,
        shape=streams.shape,
        values=streams.nnz if has_ortho else None,
        density=streams.nnz / streams.n_weights if has_ortho else None,
        relative_error=_norm_ratio(*squared_norms) if has_ortho and is_complete else None,
        zeros=int((streams.base.codes() == 0).sum()) if streams.base.bits != 16 else None,
        bytes=streams.nbytes(),
        bits_per_weight=streams.bits_per_weight(),
    )


def _norm_ratio(ortho_square: float, full_square: float) -> float:
    return math.sqrt(ortho_square / full_square) if full_square else 0.0


def _count_bytes(
    path: Path, manifest: Manifest, sizes: Sequence[tuple[str, int]], skeleton: Mapping[str, OrthoLinear]
) -> dict[str, int]:
    base = {f"{name}.{part}" for name in skeleton for part in ("qweight", "scales", "weight")}
    ortho = {f"{name}.{part}" for name in skeleton for part in ORTHO_PARTS.values()}
    stream_bytes = {
        "base": sum(size for name, size in sizes if name in base),
        "ortho": sum(size for name, size in sizes if name in ortho),
    }
    other = sum(size for _, size in sizes) - stream_bytes["base"] - stream_bytes["ortho"]
    files = (path / name for name in manifest.files)
    return {**stream_bytes, "other": other, "files": sum(file.stat().st_size for file in files if file.exists())}


@dataclass(frozen=True)
class Grid:
    """Ortho density by block (row) and projection (column); None where a block lacks one."""

    rows: list[str]
    columns: list[str]
    cells: list[list[float | None]]

    @property
    def highest(self) -> float:
        return max((value for row in self.cells for value in row if value is not None), default=0.0)


def density_grid(layers: Sequence[LayerContents]) -> Grid:
    """Ortho density by block and projection; several layers of one cell (experts, say) are added up."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for layer in layers:
        cell = _block_and_projection(layer.name)
        values, weights = counts.get(cell, (0, 0))
        counts[cell] = (values + (layer.values or 0), weights + layer.weights)
    rows = sorted(dict.fromkeys(row for row, _ in counts), key=lambda row: (not row.isdecimal(), row.zfill(9)))
    columns = list(dict.fromkeys(column for _, column in counts))
    return Grid(rows, columns, [list(_row_densities(row, columns, counts)) for row in rows])


def _row_densities(
    row: str, columns: Sequence[str], counts: Mapping[tuple[str, str], tuple[int, int]]
) -> Iterator[float | None]:
    for column in columns:
        values, weights = counts.get((row, column), (0, 0))
        yield values / weights if weights else None


def _block_and_projection(name: str) -> tuple[str, str]:
    """The first number in ``name``, and the rest of the name with further numbers as `*`."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if index is None:
        return "-", name
    return parts[index], ".".join("*" if part.isdecimal() else part for part in parts[index + 1 :]) or "-"
