"""What a checkpoint holds, counted from its files one layer at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_ortho.checkpoint.manifest import INDEX_FILE, ortho_file, read_json, read_manifest
from lm_ortho.checkpoint.read import check, memories
from lm_ortho.errors import UserError
from lm_ortho.layer import OrthoLinear, ortho_layers
from lm_ortho.streams import UNNAMED, BaseStream, LayerStreams, OrthoStream

_ORTHO_PARTS = {"rowptr": "ortho_rowptr", "cols": "ortho_cols", "vals": "ortho_vals"}


@dataclass(frozen=True)
class LayerFacts:
    """One decomposed layer; of a base-only checkpoint ``values`` and the error are None.

    ``values`` are those of the ortho stream, ``bytes`` those of both streams; ``zeros`` are codes that are 0 (None
    without a lattice). ``relative_error`` is ||W_ortho||_F / ||W(1)||_F: how far the base stream is from alpha=1.
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
    """A checkpoint: its layers, totals over them, and bytes of the tensors by where they belong.

    ``memories`` has the values of each memory whose file is there, ``missing`` names the others; while one is missing
    there is no alpha=1 to compare with, and errors are None. ``bytes`` has ``base`` and ``ortho`` (the streams),
    ``other`` (biases and whatever is not decomposed) and ``files`` (all files of the checkpoint).
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
    layers: list[LayerFacts]
    meta: dict[str, Any]


def read_contents(directory: str | PathLike[str], *, trust_remote_code: bool = False) -> CheckpointContents:
    """What is in a checkpoint. Every file is verified first; the model is never built in memory.

    Raises:
        UserError: for a directory that is no checkpoint, for damaged files and for streams that do not fit.
    """
    from lm_ortho.checkpoint import hf

    path = Path(directory)
    check(path)
    present = [name for name in memories(path) if (path / ortho_file(name)).exists()]
    skeleton = ortho_layers(hf.skeleton(path, trust_remote_code=trust_remote_code))
    facts, squares = [], []
    with ExitStack() as stack:
        tensors = _Tensors(path, present, stack)
        counts = dict.fromkeys(present, 0)
        for name, layer in skeleton.items():
            streams = _streams(name, layer, tensors)
            for memory, ortho in streams.memories.items():
                counts[memory] += ortho.nnz
            squares.append(_squares(streams))
            facts.append(_facts(name, streams, squares[-1], len(present) == len(memories(path))))
        sizes = _sizes(path, tensors.sizes, skeleton)
    first = next(iter(skeleton.values()))
    return _findings(path, counts, first, facts, squares, sizes)


class _Tensors:
    """The tensors of a checkpoint by file and name, read when they are asked for, and their sizes in bytes.

    The parts of a layer's ortho stream have the same names in the file of every memory.
    """

    def __init__(self, path: Path, memories: Sequence[str], stack: ExitStack) -> None:
        weight_map = read_json(path / INDEX_FILE).get("weight_map", {})
        self.path, self.memories = path, memories
        self.sizes: list[tuple[str, int]] = []
        self._base: dict[str, Any] = {}
        self._ortho: dict[str, dict[str, Any]] = {}
        for file in sorted({str(file) for file in weight_map.values()}):
            self._base |= self._opened(file, stack)
        for name in memories:
            self._ortho[name] = self._opened(ortho_file(name), stack)

    def _opened(self, file: str, stack: ExitStack) -> dict[str, Any]:
        try:
            handle: Any = stack.enter_context(safe_open(self.path / file, framework="pt"))
            self.sizes += _header(self.path / file).items()
            return dict.fromkeys(handle.keys(), handle)
        except (SafetensorError, OSError, ValueError):
            raise UserError(f"{self.path}: {file} cannot be read: truncated or not a safetensors file") from None

    def base(self, name: str) -> Tensor:
        return self._read(self._base, name)

    def ortho(self, memory: str, name: str) -> Tensor:
        return self._read(self._ortho[memory], name)

    def _read(self, files: Mapping[str, Any], name: str) -> Tensor:
        if name not in files:
            raise UserError(f"{self.path}: the streams lack {name}")
        tensor: Tensor = files[name].get_tensor(name)
        return tensor


def _header(file: Path) -> dict[str, int]:
    """Bytes of each tensor, from the header of a safetensors file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}


def _streams(name: str, layer: OrthoLinear, tensors: _Tensors) -> LayerStreams:
    parts = BaseStream.layout(layer.shape, layer.bits, layer.group_size)
    try:
        stored = {part: tensors.base(f"{name}.{part}") for part in parts}
        base = BaseStream(layer.shape, layer.bits, layer.group_size, **stored)
        held = {memory: _ortho(name, memory, layer, tensors) for memory in tensors.memories}
        return LayerStreams(base, held.pop(UNNAMED, None), None, held)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{tensors.path}: streams of {name} do not fit: {error}") from None


def _ortho(name: str, memory: str, layer: OrthoLinear, tensors: _Tensors) -> OrthoStream:
    parts = {field: tensors.ortho(memory, f"{name}.{part}") for field, part in _ORTHO_PARTS.items()}
    return OrthoStream(**parts, shape=layer.shape)


def _squares(streams: LayerStreams) -> tuple[float, float]:
    """||W_ortho||_F^2 and ||W(1)||_F^2; zeros without an ortho stream."""
    if not streams.memories:
        return 0.0, 0.0
    ortho = sum(float(held.vals.double().square().sum()) for held in streams.memories.values())
    return ortho, float(streams.dense(1.0).double().square().sum())


def _facts(name: str, streams: LayerStreams, squares: tuple[float, float], comparable: bool) -> LayerFacts:
    has_ortho = bool(streams.memories)
    return LayerFacts(
        name,
        streams.shape,
        streams.nnz if has_ortho else None,
        streams.nnz / streams.n_weights if has_ortho else None,
        _ratio(*squares) if has_ortho and comparable else None,
        int((streams.base.codes() == 0).sum()) if streams.base.bits != 16 else None,
        streams.nbytes(),
        streams.bits_per_weight(),
    )


def _ratio(ortho: float, whole: float) -> float:
    return math.sqrt(ortho / whole) if whole else 0.0


def _sizes(path: Path, sizes: Sequence[tuple[str, int]], skeleton: Mapping[str, OrthoLinear]) -> dict[str, int]:
    base = {f"{name}.{part}" for name in skeleton for part in ("qweight", "scales", "weight")}
    ortho = {f"{name}.{part}" for name in skeleton for part in _ORTHO_PARTS.values()}
    counted = {
        "base": sum(size for name, size in sizes if name in base),
        "ortho": sum(size for name, size in sizes if name in ortho),
    }
    other = sum(size for _, size in sizes) - counted["base"] - counted["ortho"]
    there = (path / name for name in read_manifest(path).files)
    return {**counted, "other": other, "files": sum(file.stat().st_size for file in there if file.exists())}


def _findings(
    path: Path,
    counts: dict[str, int],
    first: OrthoLinear,
    facts: list[LayerFacts],
    squares: Sequence[tuple[float, float]],
    sizes: dict[str, int],
) -> CheckpointContents:
    weights, has_ortho = sum(layer.weights for layer in facts), bool(counts)
    ortho, whole = (sum(part) for part in zip(*squares, strict=True))
    return CheckpointContents(
        str(path),
        has_ortho,
        first.bits,
        first.group_size,
        weights,
        sum(layer.values or 0 for layer in facts) / weights if has_ortho else None,
        _ratio(ortho, whole) if has_ortho and len(counts) == len(memories(path)) else None,
        sum(layer.zeros or 0 for layer in facts) / weights if first.bits != 16 else None,
        8 * (sizes["base"] + sizes["ortho"]) / weights,
        counts,
        [name for name in memories(path) if name not in counts],
        sizes,
        facts,
        read_manifest(path).meta,
    )


@dataclass(frozen=True)
class Grid:
    """Ortho density by block (row) and projection (column); None where a block lacks one."""

    rows: list[str]
    columns: list[str]
    cells: list[list[float | None]]

    @property
    def highest(self) -> float:
        return max((value for row in self.cells for value in row if value is not None), default=0.0)


def grid(layers: Sequence[LayerFacts]) -> Grid:
    """Where the memory sits: layers of one block and one projection (experts, say) are taken together."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for layer in layers:
        values, weights = counts.get(_place(layer.name), (0, 0))
        counts[_place(layer.name)] = (values + (layer.values or 0), weights + layer.weights)
    rows = sorted(dict.fromkeys(row for row, _ in counts), key=lambda row: (not row.isdigit(), row.zfill(9)))
    columns = list(dict.fromkeys(column for _, column in counts))
    return Grid(rows, columns, [list(_row(row, columns, counts)) for row in rows])


def _row(row: str, columns: Sequence[str], counts: Mapping[tuple[str, str], tuple[int, int]]) -> Iterator[float | None]:
    for column in columns:
        values, weights = counts.get((row, column), (0, 0))
        yield values / weights if weights else None


def _place(name: str) -> tuple[str, str]:
    """Block and projection: the first number in the name and what follows, further numbers as `*`."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return "-", name
    return parts[at], ".".join("*" if part.isdigit() else part for part in parts[at + 1 :]) or "-"
