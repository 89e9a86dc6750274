"""Damage of a checkpoint: tensors with other forms or values, and changes of the files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


# --- tensors


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


# --- files


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
