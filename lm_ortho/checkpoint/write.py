"""Writing a checkpoint: either complete or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lm_ortho.checkpoint.extra_files import copy_extra_files
from lm_ortho.checkpoint.manifest import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    OTHER_MODEL_FILES,
    format_version,
    ortho_file,
    read_libortho_settings,
    read_manifest,
    write_manifest,
)
from lm_ortho.errors import UserError
from lm_ortho.files import is_immovable, temporary_name
from lm_ortho.layer import get_streams, ortho_layers
from lm_ortho.layer.guard import Guard
from lm_ortho.runtime.progress import long_stage
from lm_ortho.streams import LayerStreams, bits_per_weight, density

SHARD_BYTES = 5 * 10**9
USED_FILE = ".last_used"
"""An empty file with which the cache records when an entry was last used; it moves with the checkpoint."""


def save(
    directory: str | PathLike[str],
    model: nn.Module,
    tokenizer: Any = None,
    meta: dict[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a patched transformers model as a checkpoint and returns its directory.

    All files are written under a temporary name beside the directory (inside it, if it cannot be moved itself) and
    moved at the end. Unrelated files in an existing directory stay; an older checkpoint there is replaced, except its
    tokenizer if ``tokenizer`` is None. Parameters outside the streams are stored in BF16, so a model that keeps them
    in float32 is rounded; buffers keep their dtype. ``meta`` is plain JSON that ``read_meta`` returns; its ``recipe``
    is also written to ``config.json``.

    Raises:
        UserError: for a model that is not decomposed or a directory that holds another model.
    """
    target = Path(directory).resolve()  # a link to a directory stays a link
    streams = get_streams(model)
    settings = quantization_settings(streams, meta or {})
    _check_directory(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    inside = is_immovable(target) or (target.is_dir() and not os.access(target.parent, os.W_OK))
    scratch = (target if inside else target.parent) / temporary_name(target)
    scratch.mkdir()
    try:
        with long_stage("writing", str(directory)):
            _write_tensors(scratch, model, streams, shard_bytes)
        _write_config(scratch, model, settings)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        else:
            _copy_older_tokenizer(target, scratch)
        write_manifest(scratch, meta or {}, settings["format_version"])
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Path(directory)


def quantization_settings(streams: dict[str, LayerStreams], meta: dict[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    Raises:
        UserError: for a model without decomposed layers, or with layers of different lattices.
    """
    if not streams:
        raise UserError("the model is not decomposed: nothing to save as a checkpoint")
    if adapted := next((name for name in streams if name.endswith(".base_layer")), None):
        raise UserError(
            f"layer {adapted.removesuffix('.base_layer')!r} carries an adapter, which is no part of a checkpoint; "
            "write it with save_pretrained of the adapter's model, and the checkpoint after unload()"
        )
    lattices = {(layer.base.bits, layer.base.group_size) for layer in streams.values()}
    if len(lattices) > 1:
        raise UserError(f"all layers of a checkpoint share bits and group_size, these have {sorted(lattices)}")
    bits, group_size = lattices.pop()
    memories = list(dict.fromkeys(name for layer in streams.values() for name in layer.memories))
    version = format_version(memories)
    settings: dict[str, Any] = {
        "quant_method": "libortho",
        "format_version": version,
        "bits": bits,
        "group_size": group_size,
        "density": density(streams),
        "bits_per_weight": bits_per_weight(streams),
        "modules": list(streams),
    }
    if version > 1:
        settings["memories"] = memories
    return {**settings, "recipe": meta["recipe"]} if meta.get("recipe") else settings


class SavePretrainedGuard(Guard):
    """Makes ``save_pretrained`` write a checkpoint; transformers alone would write one file for both streams."""

    method = "save_pretrained"

    def call(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes a checkpoint; the parameters are those of transformers."""
        if state_dict is not None:
            raise UserError("save_pretrained(state_dict=...) is not possible for a decomposed model")
        model = self.model
        if getattr(model, "_hf_peft_config_loaded", False):  # by add_adapter: transformers then writes the adapter only
            options = {"push_to_hub": push_to_hub, **kwargs}
            options |= {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            self.get_wrapped_method()(save_directory, is_main_process=is_main_process, **options)
            return
        quantizer = getattr(model, "hf_quantizer", None)
        if is_main_process:
            save(
                save_directory,
                model,
                None,
                getattr(quantizer, "meta", {}),
                shard_bytes=_parse_size(max_shard_size),
            )
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            option_names = ("commit_message", "private", "token", "create_pr", "revision")
            options = {name: kwargs[name] for name in option_names if name in kwargs}
            model.push_to_hub(repo_id, **options)  # type: ignore[operator]


def _write_tensors(directory: Path, model: nn.Module, streams: dict[str, LayerStreams], shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    base = base_tensors(model)
    split = split_torch_state_dict_into_shards(
        base, filename_pattern="base{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for filename, names in split.filename_to_tensors.items():
        save_file({name: base[name] for name in names}, directory / filename, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
    if len(split.filename_to_tensors) == 1:
        filename = next(iter(split.filename_to_tensors))
        total = sum(tensor.nbytes for tensor in base.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(base), filename)}
    write_json(directory / INDEX_FILE, index)
    for memory in dict.fromkeys(name for layer in streams.values() for name in layer.memories):
        ortho = {
            f"{name}.{part}": tensor.detach().cpu().contiguous()
            for name, layer in streams.items()
            for part, tensor in layer.memories[memory].tensors().items()
        }
        save_file(ortho, directory / ortho_file(memory), metadata={"format": "pt"})


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors but the ortho streams, on the CPU; a tied tensor once, under the name that the model loads."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bf16_names = {*parameters, *(f"{name}.bias" for name in ortho_layers(model))}
    tied_names = getattr(model, "all_tied_weights_keys", None) or {}
    storages: set[int] = set()
    base: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parameter = parameters.get(name)
        is_tied = parameter is not None and name in tied_names and parameters.get(tied_names[name]) is parameter
        if is_tied or name.rpartition(".")[2].startswith("ortho_") or not isinstance(tensor, Tensor):
            continue
        tensor = _cast_for_storage(name, tensor, name in bf16_names, model).cpu().contiguous()
        # safetensors has no shared memory; a layer shared by two blocks is written twice.
        storage = tensor.untyped_storage().data_ptr()
        base[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return base


def _cast_for_storage(name: str, tensor: Tensor, to_bf16: bool, model: nn.Module) -> Tensor:
    float32_modules = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    if not to_bf16 or not tensor.is_floating_point() or float32_modules & set(name.split(".")):
        return tensor.detach()
    return tensor.detach().to(torch.bfloat16)


def _write_config(directory: Path, model: Any, settings: dict[str, Any]) -> None:
    if not hasattr(model, "config"):
        raise UserError(f"{type(model).__name__} has no config: only transformers models become checkpoints")
    config = copy.deepcopy(model.config)
    config.dtype = "bfloat16"
    config.architectures = [type(model).__name__]
    config.quantization_config = settings
    config.save_pretrained(directory)
    if getattr(model, "_auto_class", None) is not None:  # a model with its own code
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, directory, config=config)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_directory(target: Path) -> None:
    """Raises ``UserError`` for a directory that holds another model."""
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; a checkpoint is a directory")
    files = [path.name for pattern in OTHER_MODEL_FILES for path in sorted(target.glob(pattern))]
    if not files and (target / CONFIG_FILE).is_file() and not _is_replaceable(target / CONFIG_FILE):
        files = [CONFIG_FILE]
    if files:
        raise UserError(f"{target} holds another model ({files[0]}); choose an empty directory")


def _is_replaceable(config: Path) -> bool:
    """Whether the configuration belongs to an lm-ortho checkpoint, or cannot be read."""
    try:
        return read_libortho_settings(config) is not None
    except UserError:
        return True


def _copy_older_tokenizer(target: Path, scratch: Path) -> None:
    """Copies the tokenizer of an older checkpoint; one that was changed since is copied as it is now."""
    names = [name for name in sorted(_older_files(target)) if (target / name).is_file()]
    copy_extra_files(target, scratch, {}, names)


def _publish(scratch: Path, target: Path) -> None:
    """Moves a finished checkpoint to its final directory.

    In one step if that does not exist, by a swap if it holds only an older checkpoint, and file by file if it holds
    unrelated files, too. In the last case the old manifest is deleted first and the new one moved last, so that
    ``load`` refuses what an interruption leaves.
    """
    older = _older_files(target)
    if scratch.parent != target:
        try:
            os.rename(scratch, target)  # also onto an empty directory
            return
        except OSError:
            if not target.is_dir():
                raise
        existing = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
        if existing <= {*older, USED_FILE}:
            _swap(scratch, target)
            return
    (target / MANIFEST_FILE).unlink(missing_ok=True)
    files = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
    for name in sorted(files, key=lambda path: path.name == MANIFEST_FILE):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / name, target / name)
    new = {path.as_posix() for path in files}
    for old in older - new:
        if old.endswith(".safetensors") and "/" not in old:  # a folder might be a link to a place elsewhere
            (target / old).unlink(missing_ok=True)


def _swap(scratch: Path, target: Path) -> None:
    backup = scratch.with_name(temporary_name(target))
    os.rename(target, backup)
    try:
        os.rename(scratch, target)
    except OSError:
        os.rename(backup, target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _older_files(target: Path) -> set[str]:
    """Files of an older checkpoint in ``target``; none if its manifest cannot be read."""
    try:
        return {*read_manifest(target).files, MANIFEST_FILE}
    except UserError:
        return set()


def _parse_size(size: int | str | None) -> int:
    """Bytes of a size such as ``"5GB"``."""
    if not isinstance(size, str):
        return size or SHARD_BYTES
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = size[:-2], size[-2:].upper()
    if unit not in units or not number.strip().replace(".", "", 1).isdecimal():
        raise UserError(f"max_shard_size={size!r}: write it like 5GB")
    return int(float(number) * units[unit])
