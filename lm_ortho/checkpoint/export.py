"""Export of a checkpoint as a plain model, in a format that other programs read without lm-ortho."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.checkpoint.extra_files import copy_extra_files, copy_file, follow_links, is_tokenizer_file
from lm_ortho.checkpoint.input_files import read_json
from lm_ortho.checkpoint.manifest import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, ortho_file, read_manifest
from lm_ortho.checkpoint.read import is_checkpoint, list_memories, load
from lm_ortho.checkpoint.write import base_tensors, write_json
from lm_ortho.dial import format_alpha, parse_alpha
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, check_output_directory
from lm_ortho.layer import get_streams, unpatch
from lm_ortho.streams import BaseStream, LayerStreams

FORMATS = ("bf16", "compressed-tensors")
_PACKED_BITS = (4, 8)


@dataclass(frozen=True)
class ExportResult:
    """An exported model; ``layers`` counts its decomposed layers, ``bytes`` is the size of its files.

    ``left_out`` names the files of the checkpoint that are neither part of the model nor of its tokenizer.
    """

    directory: str
    format: str
    alpha: float | dict[str, float]
    layers: int
    bytes: int
    left_out: tuple[str, ...] = ()


def export(
    directory: str | PathLike[str],
    out: str | PathLike[str],
    alpha: float | str | Mapping[str, float] = 0.0,
    format: str = "bf16",
    *,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Writes the plain model of a checkpoint at one ``alpha`` to ``out``, with its tokenizer, completely or not at all.

    With several memories ``alpha`` may name each (`a:0+b:1`, or a mapping). The format ``bf16`` has plain linear
    layers with W(alpha), each weight rounded once; ``compressed-tensors`` has the unchanged codes and scales of the
    base stream in its `pack-quantized` form. Of other files only those of a tokenizer are copied, and a model's own
    code with ``trust_remote_code``.

    Raises:
        UserError: for an unknown format, an occupied ``out``, an alpha or a lattice that the format cannot hold, and a
            file to copy that is a link out of the checkpoint.
    """
    from lm_ortho.checkpoint.hf import build_skeleton  # imports transformers

    source, target = Path(directory), Path(out)
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown; known: {', '.join(FORMATS)}")
    parsed_alpha = parse_alpha(alpha)
    check_output_directory(target)
    if is_checkpoint(source):  # otherwise load raises the error
        _check_streams(source, parsed_alpha, format)
        _check_generation_file(source)
    model: Any = load(source, dtype=None, trust_remote_code=trust_remote_code)
    layers = len(get_streams(model))
    with atomic_directory(target) as scratch:
        if format == "bf16":
            unpatch(model, parsed_alpha)
            model.save_pretrained(scratch)
        else:
            plain_skeleton = build_skeleton(source, decomposed=False, trust_remote_code=trust_remote_code)
            _check_plain(plain_skeleton, get_streams(model))
            _write_packed(scratch, model, source)
        left_out = _copy_remaining_files(source, scratch, trust_remote_code)
        size = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    return ExportResult(str(target), format, parsed_alpha, layers, size, left_out=left_out)


def _copy_remaining_files(source: Path, target: Path, with_code: bool) -> tuple[str, ...]:
    """Copies tokenizer, chat templates, and with ``with_code`` a model's own code; returns what the manifest has more.

    A tokenizer that was saved later is in no manifest.
    """
    listed_files = read_manifest(source).files
    paths = [path for pattern in ("*", "additional_chat_templates/*") for path in sorted(source.glob(pattern))]
    names = [path.relative_to(source).as_posix() for path in paths if not path.is_dir()]
    model_files = {CONFIG_FILE, INDEX_FILE, GENERATION_FILE}
    copied_names = copy_extra_files(
        source, target, listed_files, [*listed_files, *filter(is_tokenizer_file, names)], with_code=with_code
    )
    return tuple(
        name
        for name in listed_files
        if name not in model_files and not name.endswith(".safetensors") and name not in copied_names
    )


def _check_generation_file(source: Path) -> None:
    """Raises ``UserError`` for a generation configuration that is a link to a file elsewhere: it is written again."""
    if os.path.lexists(source / GENERATION_FILE):
        follow_links(source, GENERATION_FILE, is_listed=GENERATION_FILE in read_manifest(source).files)


def _check_streams(source: Path, alpha: float | dict[str, float], format: str) -> None:
    """Raises ``UserError``, before any weight is read, for what the checkpoint lacks or the format cannot hold."""
    memories = list_memories(source)
    alphas = alpha if isinstance(alpha, dict) else dict.fromkeys(memories, alpha)
    if unknown := [name for name in alphas if name not in memories]:
        raise UserError(f"alpha: there is no memory {unknown[0]!r}; {source} has {', '.join(memories)}")
    active = [name for name, value in alphas.items() if value]
    if format != "bf16" and active:
        raise UserError(f"alpha={format_alpha(alpha)}: format={format} holds only the base stream; use alpha=0")
    missing = [name for name in active if not (source / ortho_file(name)).exists()]
    if missing and len(memories) > 1:
        raise UserError(f"alpha={format_alpha(alpha)}: {source} lacks {ortho_file(missing[0])}; use 0 for {missing[0]}")
    if missing:
        raise UserError(
            f"alpha={format_alpha(alpha)}: {source} holds only the base stream, so only alpha=0 can be exported"
        )
    if format == "bf16":
        return
    bits = read_json(source / CONFIG_FILE)["quantization_config"].get("bits")
    if bits not in _PACKED_BITS:
        raise UserError(f"format={format}: {source} has a base stream of {bits} bits; 4 or 8 can be exported")


def _write_packed(target: Path, model: Any, source: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    streams = get_streams(model)
    base = next(iter(streams.values())).base
    stream_names = {f"{name}.{part}" for name in streams for part in ("qweight", "scales")}
    tensors = {name: tensor for name, tensor in base_tensors(model).items() if name not in stream_names}
    for name, layer in streams.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack_base_stream(layer.base).items()}
    save_torch_state_dict(tensors, target)
    config = read_json(source / CONFIG_FILE)
    config["quantization_config"] = _make_quantization_config(base, model)
    write_json(target / CONFIG_FILE, config)
    if (source / GENERATION_FILE).exists():
        copy_file(source, GENERATION_FILE, target, read_manifest(source).files.get(GENERATION_FILE))


def _check_plain(plain: nn.Module, streams: dict[str, LayerStreams]) -> None:
    """Raises ``UserError`` for a layer that the format, or transformers reading it, cannot represent."""
    for name, layer in streams.items():
        group = layer.base.group_size
        try:
            module = plain.get_submodule(name)
        except AttributeError:
            raise UserError(f"format=compressed-tensors: {name} is a part of experts in one tensor; use bf16") from None
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            raise UserError(f"format=compressed-tensors: {name} is a {type(module).__name__}, not an nn.Linear")
        if layer.shape[1] % group:
            raise UserError(
                f"format=compressed-tensors: {name} has {layer.shape[1]} columns, no multiple of the group of {group}; "
                "decompose with a group_size that divides every width"
            )


def pack_base_stream(base: BaseStream) -> dict[str, Tensor]:
    """The tensors of a 4 or 8 bit base stream in `pack-quantized` form.

    ``weight_packed`` (out_features, in_features * bits / 32) int32, ``weight_scale`` (out_features, groups) BF16,
    ``weight_shape`` (2,) int64. Both formats store a code ``c`` as ``c + 2^(bits-1)``, the first code in the lowest
    bits, so four bytes of ``qweight`` are one word of ``weight_packed`` on a little-endian machine.
    """
    if base.qweight is None or base.scales is None:
        raise ValueError("a 16-bit base stream has no codes to pack")
    words = base.qweight.contiguous().view(torch.int32)
    return {"weight_packed": words, "weight_scale": base.scales, "weight_shape": torch.tensor(base.shape)}


def _make_quantization_config(base: BaseStream, model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config``: one scheme for all linear layers, except those that were not decomposed."""
    weights = {
        "num_bits": base.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": base.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    }
