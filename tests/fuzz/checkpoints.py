"""Fuzzes checkpoints: tensors of one layer through the validator and the kernels, and files through every way in.

A case changes a sound layer or a sound checkpoint in a few places that a reader depends on, and makes the manifest
agree. The package must give what the files say, or one ``UserError`` in one printable line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lm_ortho.checkpoint import hf, load, save
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.export import export
from lm_ortho.errors import MESSAGE_LIMIT, UserError
from lm_ortho.kernels import cpu, pack_codes
from lm_ortho.layer import ortho_layers, patch
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream, validate_layer
from tests.support import tiny

SUBPROCESS = True
"""A case may crash the interpreter, where the package is wrong."""
SECONDS = 20
"""Time of one case; the machine may be busy, so it is far above what any case needs."""
FILE_CASES = 16
"""One of so many cases goes through files; the others, of half a millisecond each, change tensors in memory."""
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError)
"""What a second change meets in files that the first has damaged; it then changes nothing."""
HOSTILE_NUMBERS = (0, 1, -1, 2, 7, 8, 127, 255, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), -2)
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


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


def damage_tensor(draw: random.Random, tensor: Tensor | None) -> Any:
    """The tensor with another dtype, shape, layout or with other values."""
    if tensor is None or tensor.is_meta or tensor.layout != torch.strided:
        return tensor
    choices: list[Callable[[Tensor], Any]] = [
        lambda t: t.to(draw.choice(DTYPES)),
        lambda t: t.reshape(-1) if t.dim() > 1 else t.reshape(1, -1),
        lambda t: t[: draw.randint(0, len(t))],
        lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
        lambda t: t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2],
        lambda t: t[:1].expand(t.shape) if len(t) else t,
        lambda t: None if draw.random() < 0.3 else t,
        lambda t: t.to("meta") if draw.random() < 0.3 else t,
        lambda t: _set_values(draw, t),
        lambda t: _set_values(draw, t),
        lambda t: _set_values(draw, t),
    ]
    return draw.choice(choices)(tensor)


def _set_values(draw: random.Random, tensor: Tensor) -> Tensor:
    """A copy with a few hostile numbers; others of the same tensor are swapped."""
    tensor = tensor.clone()
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    for _ in range(draw.randint(1, 3)):
        if not flat.numel():
            break
        place = draw.randrange(flat.numel())
        if draw.random() < 0.3:
            other = draw.randrange(flat.numel())
            flat[[place, other]] = flat[[other, place]]
        elif tensor.is_floating_point():
            flat[place] = draw.choice([float("nan"), float("inf"), -float("inf"), 0.0, 1.0])
        elif tensor.dtype == torch.bool:
            flat[place] = True
        else:
            limits = torch.iinfo(tensor.dtype)
            flat[place] = min(max(draw.choice([*HOSTILE_NUMBERS, int(flat[place]) + 1]), limits.min), limits.max)
    return tensor


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

READERS: dict[str, Callable[[Path], Any]] = {
    "load": load,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "inspect": read_contents,
    "export": lambda path: export(path, path.parent / "out"),
}


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


# --- changes of files


def odd_value(draw: random.Random) -> Any:
    """A value of JSON that no reader expects."""
    texts = ["", "x", "\x1b[31m", "\ud800", "../x", "a\0b", "x" * 5000, "[/x]", "nan", "base.safetensors"]
    numbers = [*HOSTILE_NUMBERS, 10**300, 1.5, -0.5, 1e308, float("nan"), float("inf"), True, False, None]
    nested: Any = draw.choice([1, "x", None])
    for _ in range(draw.choice([1, 2, 70, 500])):
        nested = [nested] if draw.random() < 0.5 else {"x": nested}
    lists: list[Any] = [[], {}, [1], [None], {"a": 1}, ["x"] * 2000, nested]
    return draw.choice(draw.choice([texts, numbers, lists]))


def _edit_json(draw: random.Random, path: Path) -> None:
    """Changes, deletes or adds one value anywhere in a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError):
        return
    node: Any = content
    for _ in range(draw.randrange(4)):
        inner = [part for part in (node.values() if isinstance(node, dict) else node) if isinstance(part, dict | list)]
        if not inner or draw.random() < 0.3:
            break
        node = draw.choice(inner)
    if isinstance(node, dict):
        key = draw.choice([*node, "self", "to_dict", "x", "n_layers", "auto_map", "torch_dtype", "\ud800"])
        if key in node and draw.random() < 0.3:
            del node[key]
        else:
            node[key] = odd_value(draw)
    elif node:
        node[draw.randrange(len(node))] = odd_value(draw)
    else:
        node.append(odd_value(draw))
    with contextlib.suppress(ValueError, RecursionError):
        path.write_text(json.dumps(content))


JSON_FILES = ("config.json", "config.json", "manifest.json", "model.safetensors.index.json", "generation_config.json")


def _change_json(draw: random.Random, directory: Path) -> None:
    path = directory / draw.choice(JSON_FILES)
    if path.is_file() and not path.is_symlink():
        _edit_json(draw, path)


def _change_setting(draw: random.Random, directory: Path) -> None:
    """One field of ``quantization_config``, with a value that is nearly right."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_bytes())
        settings = content["quantization_config"]
    except UNREADABLE:
        return
    if not isinstance(settings, dict):
        return
    values: dict[str, list[Any]] = {
        "bits": [3, 8, 16, 4.0, "4"],
        "group_size": [16, 24, 8.0, 2**40],
        "format_version": [1, 3, True],
        "memories": [["alice"], ["bob", "alice"], ["alice", "alice"], ["carol"], ["memory"], "alice", ["../x"], []],
        "modules": [["model"], [""], ["model.norm"], ["lm_head"], settings.get("modules", []) * 2, "model.norm"]
        if isinstance(settings.get("modules"), list)
        else [[]],
    }
    name = draw.choice(sorted(values))
    settings[name] = draw.choice(values[name])
    path.write_text(json.dumps(content))


def _change_tensors(draw: random.Random, directory: Path) -> None:
    """Changes, deletes, renames or adds one tensor of a file."""
    path = directory / draw.choice(["base.safetensors", "ortho-alice.safetensors", "ortho-bob.safetensors"])
    try:
        tensors = load_file(path)
    except Exception:
        return
    name = draw.choice(sorted(tensors))
    action = draw.randrange(10)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[draw.choice(["x", "model.layers.0.mlp.up_proj.weight", "\x1b[31m"])] = tensors[name].clone()
    elif action == 2:
        tensors[draw.choice(sorted(tensors))] = tensors[name].clone()
    else:
        tensor = damage_tensor(draw, tensors[name])
        if tensor is None or tensor.is_meta:
            return
        tensors[name] = tensor.contiguous().clone()
    save_file(tensors, path, metadata={"format": "pt"})


def _change_bytes(draw: random.Random, directory: Path) -> None:
    """Cuts a file, extends it, or overwrites bytes, most of them near its beginning."""
    files = [path for path in directory.iterdir() if path.is_file() and not path.is_symlink()]
    if not files:
        return
    path = draw.choice(sorted(files))
    content = bytearray(path.read_bytes())
    action = draw.randrange(4)
    if action == 0:
        content = content[: draw.randrange(len(content) + 1)]
    elif action == 1:
        content += bytes(draw.randrange(20))
    elif action == 2:
        content = bytearray(draw.choice([b"", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b"null", b"{}"]))
    else:
        for _ in range(draw.randint(1, 4)):
            if content:
                content[min(draw.randrange(len(content)), draw.randrange(200))] = draw.randrange(256)
    path.write_bytes(content)


def _replace_file(draw: random.Random, directory: Path) -> None:
    """Puts something else in the place of a file: nothing, a pipe, a folder, a link."""
    files = sorted(path for path in directory.iterdir() if not path.is_dir())
    if not files:
        return
    path = draw.choice(files)
    path.unlink()
    action = draw.randrange(6)
    if action == 1:
        os.mkfifo(path)
    elif action == 2:
        path.mkdir()
    elif action > 2:
        others = [file.name for file in files if file != path]
        path.symlink_to(draw.choice(["/dev/zero", "/dev/null", "/etc/passwd", "/nowhere", path.name, *others]))


def _add_file(draw: random.Random, directory: Path) -> None:
    """Adds weights, code or settings that transformers might read instead of those of the checkpoint."""
    name = draw.choice(
        [
            "model.safetensors",
            "pytorch_model.bin",
            "adapter_config.json",
            "adapter_model.safetensors",
            "modeling_llama.py",
            "ortho.safetensors",
            "model.safetensors.index.fp16.json",
            "base-00001-of-00002.safetensors",
        ]
    )
    base = directory / "base.safetensors"
    if name.endswith(".safetensors") and base.is_file() and not base.is_symlink() and not (directory / name).is_dir():
        shutil.copyfile(base, directory / name)
    elif not (directory / name).exists():
        (directory / name).write_text(draw.choice(["", "{}", "raise SystemExit('ran')"]))
    if draw.random() < 0.5:
        with contextlib.suppress(*UNREADABLE):
            content = json.loads((directory / "manifest.json").read_bytes())
            content["files"][name] = {"sha256": "", "bytes": 0}
            (directory / "manifest.json").write_text(json.dumps(content))


def _point_elsewhere(draw: random.Random, directory: Path) -> None:
    """Lets the index name files in other places."""
    with contextlib.suppress(*UNREADABLE):
        path = directory / "model.safetensors.index.json"
        content = json.loads(path.read_bytes())
        file = draw.choice(["sub/base.safetensors", "../checkpoint/base.safetensors", "ortho-bob.safetensors", "x", 5])
        content["weight_map"] = dict.fromkeys(content["weight_map"], file)
        path.write_text(json.dumps(content))
        (directory / "sub").mkdir(exist_ok=True)
        shutil.copyfile(directory / "base.safetensors", directory / "sub" / "base.safetensors")


FILE_CHANGES: tuple[Callable[[random.Random, Path], None], ...] = (
    *[_change_json] * 4,
    *[_change_tensors] * 5,
    *[_change_setting] * 2,
    _change_bytes,
    _replace_file,
    _add_file,
    _point_elsewhere,
)


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
