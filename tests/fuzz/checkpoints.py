"""Fuzzes checkpoints: tensors of one layer through the validator and the kernels, and files through every way in.

A case changes a sound layer or a sound checkpoint in a few places that a reader depends on, and makes the manifest
agree. The package must give what the files say, or one ``UserError`` in one printable line.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lm_ortho.checkpoint import hf, save
from lm_ortho.errors import MESSAGE_LIMIT, UserError
from lm_ortho.kernels import cpu, pack_codes
from lm_ortho.layer import ortho_layers, patch
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream, validate_layer
from tests.fuzz.damage import FILE_CHANGES, HOSTILE_NUMBERS, UNREADABLE, damage_tensor
from tests.support import tiny
from tests.support.changed_checkpoint import READERS

SUBPROCESS = True
"""A case may crash the interpreter, where the package is wrong."""
SECONDS = 20
"""Time of one case; the machine may be busy, so it is far above what any case needs."""
FILE_CASES = 16
"""One of so many cases goes through files; the others, of half a millisecond each, change tensors in memory."""


def run_case(seed: int) -> str:
    """Runs one case; returns "right" or "refused".

    Raises:
        AssertionError: where the package does anything else, with the seed.
    """
    draw = random.Random(seed)
    try:
        with _time_limit():
            return _run_files(draw) if draw.randrange(FILE_CASES) == 0 else _run_tensors(draw)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    except _HangError:
        raise AssertionError(f"seed {seed}: no answer within {SECONDS} seconds") from None
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__} instead of a UserError: {error!s:.300}") from error


# --- tensors in memory


def _run_tensors(draw: random.Random) -> str:
    shape, bits, group_size, layer = _draw_layer(draw)
    for _ in range(draw.randrange(4)):
        _damage_layer(draw, layer)
    if draw.random() < 0.1:
        shape = _draw_shape(draw, shape)
    if draw.random() < 0.1:
        bits, group_size = draw.choice([3, 4, 8, 5, 0, -4, 4.0, True, 2**40]), draw.choice([8, 16, 0, -8, 12, 2**40])
    memories = {name: layer[name] for name in ("alice", "bob")}
    expected = _is_valid(shape, bits, group_size, layer)
    try:
        validate_layer(shape, bits, group_size, layer["base"], memories=memories, bias=layer["parts"].get("bias"))
    except ValueError as error:
        if expected:
            raise AssertionError(f"a sound layer is refused: {error}") from error
        return "refused"
    assert expected, "a layer that is not sound passes"
    _check_products(shape, bits, group_size, layer)
    return "right"


def _draw_layer(draw: random.Random) -> tuple[Any, Any, Any, dict[str, dict[str, Any]]]:
    """Shape, bits, group size and tensors of a small layer with two memories."""
    out_features, in_features = draw.randint(1, 70), draw.randint(1, 40)
    bits, group_size = draw.choice([3, 4, 8, 16]), draw.choice([8, 16, 24])
    random_numbers = torch.Generator().manual_seed(draw.randrange(2**31))
    groups = -(-in_features // group_size)
    if bits == 16:
        weight = torch.randn(out_features, in_features, generator=random_numbers).bfloat16()
        base: dict[str, Any] = {"weight": weight}
    else:
        low = -(1 << (bits - 1))
        codes = torch.randint(low, -low, (out_features, groups * group_size), generator=random_numbers)
        codes[:, in_features:] = 0
        scales = torch.rand(out_features, groups, generator=random_numbers).bfloat16()
        base = {"qweight": pack_codes(codes, bits), "scales": scales}
    place = torch.rand(out_features, in_features, generator=random_numbers)
    layer: dict[str, dict[str, Any]] = {"base": base, "parts": {}}
    for name, mask in (("alice", place < 0.2), ("bob", place > 0.9)):
        ends = mask.sum(1).cumsum(0)
        rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(draw.choice([torch.int32, torch.int64]))
        cols = mask.nonzero()[:, 1].int()
        vals = torch.randn(len(cols), generator=random_numbers).bfloat16()
        layer[name] = {"rowptr": rowptr, "cols": cols, "vals": vals}
    if draw.random() < 0.5:
        layer["parts"]["bias"] = torch.randn(out_features, generator=random_numbers)
    return (out_features, in_features), bits, group_size, layer


def _draw_shape(draw: random.Random, shape: tuple[int, int]) -> tuple[Any, ...]:
    index = draw.randrange(2)
    value = draw.choice([*HOSTILE_NUMBERS, shape[index] + 1, shape[index] - 1, True, 2.0])
    return (value, shape[1]) if index == 0 else (shape[0], value)


def _damage_layer(draw: random.Random, layer: dict[str, dict[str, Any]]) -> None:
    group = layer[draw.choice(["base", "alice", "bob", "bob", "alice", "parts"])]
    if group:
        name = draw.choice(sorted(group))
        group[name] = damage_tensor(draw, group[name])


def _is_valid(shape: Any, bits: Any, group_size: Any, layer: dict[str, dict[str, Any]]) -> bool:
    """The definition of a sound layer, written down once more, in numbers of any size."""
    if any(type(number) is not int or not 1 <= number < 2**31 for number in shape):
        return False
    if type(bits) is not int or type(group_size) is not int or bits not in (3, 4, 8, 16):
        return False
    if not 8 <= group_size <= 2**16 or group_size % 8:
        return False
    out_features, in_features = shape
    groups = -(-in_features // group_size)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (torch.bfloat16, (out_features, in_features))}
    if bits != 16:
        packed = (out_features, groups * group_size * bits // 8)
        expected = {"qweight": (torch.uint8, packed), "scales": (torch.bfloat16, (out_features, groups))}
    if {name for name, tensor in layer["base"].items() if tensor is not None} != set(expected):
        return False
    if not all(_fits(layer["base"][name], *form) for name, form in expected.items()):
        return False
    bias = layer["parts"].get("bias")
    if bias is not None and not (bias.dtype.is_floating_point and tuple(bias.shape) == (out_features,)):
        return False
    if bias is not None and (bias.is_meta or not bias.to(torch.bfloat16).float().isfinite().all()):
        return False
    places: list[tuple[int, int]] = []
    for name in ("alice", "bob"):
        own_places = _read_places(layer[name], out_features, in_features)
        if own_places is None:
            return False
        places += own_places
    return len(set(places)) == len(places)


def _fits(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    if tensor.is_meta or tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        return False
    return not dtype.is_floating_point or bool(tensor.float().isfinite().all())


def _read_places(parts: Mapping[str, Any], out_features: int, in_features: int) -> list[tuple[int, int]] | None:
    """Row and column of each value; None unless the matrix is sound."""
    rowptr, cols, vals = parts["rowptr"], parts["cols"], parts["vals"]
    if rowptr is None or cols is None or vals is None or vals.dim() != 1:
        return None
    nnz = len(vals)
    if not _fits(vals, torch.bfloat16, (nnz,)) or not _fits(cols, torch.int32, (nnz,)):
        return None
    if rowptr.dtype not in (torch.int32, torch.int64) or not _fits(rowptr, rowptr.dtype, (out_features + 1,)):
        return None
    starts, columns = rowptr.tolist(), cols.tolist()
    if starts[0] != 0 or starts[-1] != nnz or starts != sorted(starts):
        return None
    places = []
    for row in range(out_features):
        part = columns[starts[row] : starts[row + 1]]
        if any(not 0 <= column < in_features for column in part) or sorted(set(part)) != part:
            return None
        places += [(row, column) for column in part]
    return places


def _check_products(shape: Any, bits: int, group_size: int, layer: dict[str, dict[str, Any]]) -> None:
    """The C++ kernel and the dense weight agree on a layer that passed."""
    memories = {name: OrthoStream(**layer[name], shape=shape) for name in ("alice", "bob")}
    streams = LayerStreams(BaseStream(shape, bits, group_size, **layer["base"]), None, None, memories)
    dense = streams.to_dense(1.0, torch.float64)
    if bits == 16 or not isinstance(cpu.find(), cpu.Library):
        return
    base = cpu.pack_base(streams.base.qweight, streams.base.scales, bits, group_size)
    sheets = [cpu.pack_sheets(ortho.rowptr, ortho.cols, ortho.vals, shape[1]) for ortho in memories.values()]
    x = torch.ones(2, shape[1], dtype=torch.bfloat16)
    form = {"out_features": shape[0], "bits": bits, "group_size": group_size}
    y = cpu.cpu_linear(x, base, sheets, [torch.ones(1), torch.ones(1)], None, **form, wide=True)
    bound = 1e-4 * dense.abs().sum(1) + 1e-4 * streams.base.dequantise(torch.float64).abs().sum(1) + 1e-30
    assert bool(((y.double() - dense.sum(1)).abs() <= bound).all()), "the C++ kernel gives another product"


# --- files


@lru_cache(maxsize=1)
def make_checkpoint() -> Path:
    """A checkpoint of a very small model with two memories; it is removed when the process ends."""
    hf.register()
    folder = tempfile.TemporaryDirectory(prefix="fuzz-checkpoints-")
    _folders.append(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    model = tiny.llama(**sizes, num_attention_heads=2, num_key_value_heads=1)
    streams = {}
    for name, layer in tiny.model_streams(model, group_size=8, density=0.3).items():
        assert layer.ortho is not None
        dense, support = layer.ortho.to_dense(), layer.ortho.support()
        left = support & (torch.arange(support.numel()).view_as(support) % 2 == 0)
        memories = {"alice": OrthoStream.from_dense(dense, left), "bob": OrthoStream.from_dense(dense, support & ~left)}
        streams[name] = LayerStreams(layer.base, None, None, memories)
    patch(model, streams)
    return save(Path(folder.name) / "checkpoint", model, meta={"recipe": {"density": 0.3}})


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _run_files(draw: random.Random) -> str:
    source = make_checkpoint()
    with tempfile.TemporaryDirectory(prefix="fuzz-checkpoint-", dir=source.parent) as folder:
        directory = Path(folder) / "checkpoint"
        shutil.copytree(source, directory)
        changes = [draw.choice(FILE_CHANGES) for _ in range(draw.choice([0, 1, 1, 1, 2]))]
        for change in changes:
            change(draw, directory)
        if draw.random() < 0.9:
            _agree(directory)
        name = draw.choice(sorted(READERS))
        try:
            result = READERS[name](directory)
        except UserError as error:
            if not changes:
                raise AssertionError(f"{name} refuses a sound checkpoint: {error}") from error
            _check_refusal(name, str(error), directory)
            return "refused"
        except Exception as error:
            # What transformers says about a configuration before it asks for a quantiser is its own.
            if name == "from_pretrained" and not _is_ours(error):
                return "refused"
            raise AssertionError(f"{name}: {type(error).__name__} instead of a UserError: {error!s:.300}") from error
        _check_result(name, result, directory)
        return "right"


def _check_refusal(name: str, message: str, directory: Path) -> None:
    assert message.isprintable(), f"{name}: not one printable line: {message!r:.300}"
    assert message.strip(), f"{name}: an empty message"
    assert len(message) <= MESSAGE_LIMIT, f"{name}: a message of {len(message)} characters"
    assert not (directory.parent / "out").exists(), f"{name} leaves a half-written export"


def _is_ours(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return any("/lm_ortho/" in frame.filename for frame in frames)


def _check_result(name: str, result: Any, directory: Path) -> None:
    """What was read is what the files of the manifest say."""
    base = load_file(directory / "base.safetensors")
    files = {memory: directory / f"ortho-{memory}.safetensors" for memory in ("alice", "bob")}
    memories = {memory: load_file(path) for memory, path in files.items() if path.exists()}
    if name in ("load", "from_pretrained"):
        for layer_name, layer in ortho_layers(result).items():
            streams = layer.streams()
            for part, tensor in streams.base.tensors().items():
                assert torch.equal(tensor, base[f"{layer_name}.{part}"]), f"{name}: {layer_name}.{part} differs"
            for memory, ortho in streams.memories.items():
                for part, tensor in ortho.tensors().items():
                    stored = memories[memory][f"{layer_name}.{part}"]
                    assert torch.equal(tensor, stored), f"{name}: {layer_name}.{part} of {memory} differs"
        embedding = result.get_input_embeddings().weight
        assert torch.equal(embedding.bfloat16(), base["model.embed_tokens.weight"]), f"{name}: the embedding differs"
    elif name == "inspect":
        counts = {
            memory: sum(t.numel() for key, t in tensors.items() if key.endswith("ortho_vals"))
            for memory, tensors in memories.items()
        }
        assert {memory: count for memory, count in result.memories.items() if count} == {
            memory: count for memory, count in counts.items() if count and memory in result.memories
        }
    else:
        written = load_file(directory.parent / "out" / "model.safetensors")
        embedding = base["model.embed_tokens.weight"]
        assert torch.equal(written["model.embed_tokens.weight"].bfloat16(), embedding), "the export differs"


def _agree(directory: Path) -> None:
    """Makes the manifest agree with the files, as far as it can still be read."""
    path = directory / "manifest.json"
    if path.is_symlink() or not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        for name, record in content["files"].items():
            file = directory / name
            if file.is_file() and file.stat().st_size < 2**20 and "dev" not in file.resolve().parts:
                data = file.read_bytes()
                record.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        path.write_text(json.dumps(content))
    except UNREADABLE:
        return


class _HangError(BaseException):
    """A case took too long. No ``except Exception`` of the package can swallow it."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises ``_HangError`` after ``SECONDS``; in the main thread, where the signal arrives."""

    def interrupt(*_: object) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
