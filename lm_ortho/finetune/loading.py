"""Loads models, configurations and tokenizers, and refuses in one line what cannot be worked with."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_ortho.config import check_place
from lm_ortho.errors import UserError, printable
from lm_ortho.hub import describe_hub_error, first_line

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only


def round_to_bf16(model: nn.Module) -> nn.Module:
    """Rounds every floating-point parameter in place to a BF16 value, stored in its own dtype; returns the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.bfloat16())
    return model


def load_causal_lm(pretrained: str | Path, *, argument: str = "pretrained", **hub: Any) -> nn.Module:
    """Loads a decoder model in float32, with weights rounded to BF16 values; one of a GGUF file is dequantised.

    ``argument`` is the name of the argument in error messages. ``hub``: revision, subfolder, trust_remote_code,
    gguf_file. ``pretrained`` may be a GGUF file itself.

    Raises:
        UserError: with a message of one line, for a missing directory, a directory without a config, an
            encoder-decoder model, a quantised model, an adapter among the files, weights that are missing, that have
            another shape than in the config, or that are NaN or infinite, and without network access.
    """
    # 1. Check the configuration before anything large is read.
    pretrained, hub = split_gguf(pretrained, hub)
    config = load_config(pretrained, argument=argument, **hub)
    check_decoder(config, f"{argument}={str(pretrained)!r}")
    if method := quantisation_method(config):
        raise UserError(
            f"{argument}={str(pretrained)!r}: weights are already packed ({method}); pass the unquantised model"
        )
    if gguf_file := hub.get("gguf_file"):
        log.info("%s: the weights of %s are dequantised, %s", argument, gguf_file, describe_gguf(pretrained, gguf_file))
    from transformers import AutoModelForCausalLM

    # 2. Load the weights.
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            expand_path(pretrained),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names and shapes
            **_without_code_prompt(hub),
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = describe_hub_error(error, pretrained, hub.get("revision"))
        raise UserError(f"{argument}={str(pretrained)!r}: could not be loaded ({reason})") from None
    except Exception as error:  # safetensors has error classes of its own for damaged files
        raise UserError(f"{argument}={str(pretrained)!r}: weights are damaged ({first_line(error)})") from None
    if gguf_file:
        _mark_as_plain(model)
    # 3. Check that every weight came from the files and is finite.
    _check_loading_info(model, loading_info, f"{argument}={str(pretrained)!r}")
    check_finite(model, f"{argument}={str(pretrained)!r}")
    return round_to_bf16(model).eval()


def _check_loading_info(model: nn.Module, loading_info: Mapping[str, Any], source: str) -> None:
    """Raises ``UserError`` for weights that were not loaded from the files and would be random.

    ``source`` begins the message, as in ``pretrained='...'``.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{source}: an adapter is among the model's files and is not merged; move its adapter_config.json and "
            "adapter_model.safetensors to another directory and pass that as peft="
        )
    for name, file_shape, config_shape in sorted(loading_info.get("mismatched_keys", ())):
        raise UserError(
            f"{source}: {name} is {_format_shape(file_shape)} in the files and {_format_shape(config_shape)} by the "
            "config; one of them belongs to another model"
        )
    if missing := sorted(loading_info.get("missing_keys", ())):
        raise UserError(
            f"{source}: the files lack {len(missing)} weights of {type(model).__name__}, first {missing[0]}; they "
            "would be random, so complete the files or correct the config"
        )


def _format_shape(shape: Any) -> str:
    return " x ".join(map(str, shape))


def check_finite(model: nn.Module, source: str) -> None:
    """Raises ``UserError`` for NaN or infinite weights; ``source`` begins the message."""
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise UserError(f"{source}: {len(bad)} weights hold NaN or infinite values, first {bad[0]}")


def load_config(pretrained: str | Path, *, argument: str = "pretrained", **hub: Any) -> Any:
    """Loads the configuration of a model; raises ``UserError`` as ``load_causal_lm``."""
    from transformers import AutoConfig

    find_place(pretrained, argument)
    pretrained, hub = split_gguf(pretrained, hub)
    local = find_place(pretrained, argument)
    inside = local / hub.get("subfolder", "")
    gguf_file = hub.get("gguf_file")
    if gguf_file:
        _check_gguf(local, inside / gguf_file, f"{argument}={str(pretrained)!r}")
    elif local.is_file():
        raise UserError(f"{argument}={str(pretrained)!r} is a file; give the directory of the model, or a GGUF file")
    elif local.is_dir() and not (inside / "config.json").is_file():
        folder = f"subfolder {hub['subfolder']!r}" if hub.get("subfolder") else "directory"
        if (inside / "adapter_config.json").is_file():
            raise UserError(
                f"{argument}={str(pretrained)!r}: the {folder} holds an adapter, not the model it belongs to"
            )
        raise UserError(f"{argument}={str(pretrained)!r}: the {folder} holds no config.json")
    if not local.is_dir() and (local.is_absolute() or str(pretrained).startswith((".", "~"))):
        raise UserError(f"{argument}={str(pretrained)!r}: no such directory")
    if local.is_dir() and hub.get("revision") not in (None, "main"):
        raise UserError(
            f"revision={hub['revision']!r}: {argument}={str(pretrained)!r} is a directory, which has no revisions; "
            "leave it out, or use the model's name on the hub"
        )
    try:
        config = AutoConfig.from_pretrained(expand_path(pretrained), **_without_code_prompt(hub))
    except Exception as error:  # hub client, JSON and configuration errors have no common base
        reason = describe_hub_error(error, pretrained, hub.get("revision"))
        raise UserError(
            f"{argument}={str(pretrained)!r}: its config could not be read "
            f"({f'{gguf_file}: ' if gguf_file else ''}{reason})"
        ) from None
    if gguf_file and quantisation_method(config) == "gguf":
        del config.quantization_config  # the weights are dequantised
    return config


def load_tokenizer(source: str | Path, **hub: Any) -> Any:
    """Loads the tokenizer of a directory or hub id; ``hub`` as in ``load_causal_lm``.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    find_place(source, "tokenizer")
    source, hub = split_gguf(source, hub)
    if hub.get("gguf_file"):
        _require_gguf_package()
    local = find_place(source, "tokenizer")
    if not local.is_dir() and (local.is_absolute() or str(source).startswith((".", "~"))):
        raise UserError(f"tokenizer={str(source)!r}: no such directory")
    try:
        return AutoTokenizer.from_pretrained(expand_path(source), **_without_code_prompt(hub))
    except Exception as error:  # hub client, JSON and tokenizer errors have no common base
        reason = describe_hub_error(error, source, hub.get("revision"))
        raise UserError(
            f"tokenizer={str(source)!r} could not be loaded ({reason}); use the directory or hub id of a tokenizer"
        ) from None


def split_gguf(source: str | Path, hub: Mapping[str, Any]) -> tuple[str | Path, dict[str, Any]]:
    """Returns directory and options as transformers takes them where ``source`` is a GGUF file itself."""
    path = Path(expand_path(source))
    if path.suffix.lower() == ".gguf" and path.is_file() and not hub.get("gguf_file"):
        return str(path.parent), {**hub, "gguf_file": path.name}
    return source, dict(hub)


def _check_gguf(local: Path, file: Path, source: str) -> None:
    """Raises ``UserError`` for a GGUF file that cannot be read; ``source`` begins the message."""
    if local.is_dir() and not file.is_file():
        names = sorted(path.name for path in local.glob("*.gguf"))
        hint = f"it holds {', '.join(names[:3])}" if names else "it holds no GGUF file"
        raise UserError(f"gguf_file={file.name!r:.80}: no such file in {source} ({hint})")
    if file.is_file():
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"gguf_file={file.name!r:.80}: {source} has a file of that name that is no GGUF file")
    _require_gguf_package()


def _require_gguf_package() -> None:
    if find_spec("gguf") is None:
        raise UserError("gguf_file: reading it needs the package gguf: pip install 'lm-ortho[gguf]'")


def describe_gguf(directory: str | Path, gguf_file: str) -> str:
    """Returns the types of the tensors in a local GGUF file, such as Q4_1 (210), F32 (61); else a generic phrase."""
    path = Path(expand_path(directory)) / gguf_file
    if not path.is_file():
        return "whatever their types are"
    from gguf import GGUFReader

    counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors)
    return "of " + ", ".join(f"{name} ({number})" for name, number in counts.most_common(4))


def _mark_as_plain(model: Any) -> None:
    """Removes what transformers notes about the packed file: with it a model is neither cast nor written."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        if name in vars(model):
            delattr(model, name)


def check_decoder(config: Any, source: str) -> None:
    """Raises ``UserError`` for the configuration of an encoder-decoder model; ``source`` begins the message."""
    if getattr(config, "is_encoder_decoder", False):
        kind = getattr(config, "model_type", type(config).__name__)
        raise UserError(f"{source}: {kind} is an encoder-decoder model; a decoder is needed")


def quantisation_method(config: Any) -> str:
    """Returns the quantisation method in a model's configuration; an empty string if it is not quantised."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return ""
    if isinstance(quantisation, dict):
        return str(quantisation.get("quant_method"))
    return str(getattr(quantisation, "quant_method", quantisation))


def find_place(source: str | Path, argument: str) -> Path:
    """Returns the path that ``source`` is, if it is one, with ``~`` expanded.

    Raises:
        UserError: for a name that cannot be looked up: too long, of an unknown user (``~name``), without permission.
    """
    try:
        return Path(check_place(str(source))).expanduser()
    except ValueError as error:
        raise UserError(f"{argument}={printable(source, 80)!r}: {error}") from None


def expand_path(source: str | Path) -> str:
    """Returns an existing path with ``~`` expanded; any other name unchanged."""
    local = Path(str(source)).expanduser()
    return str(local) if local.exists() else str(source)


def _without_code_prompt(hub: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with a default for ``trust_remote_code``; without it transformers prompts on the terminal."""
    return {"trust_remote_code": False, **hub}
