"""Loads models, configurations and tokenizers, and refuses in one line what cannot be worked with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_ortho.config import check_place
from lm_ortho.errors import UserError, printable
from lm_ortho.hub import describe_hub_error, first_line


def round_to_bf16(model: nn.Module) -> nn.Module:
    """Rounds every floating-point parameter in place to a BF16 value, stored in its own dtype; returns the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.bfloat16())
    return model


def load_causal_lm(pretrained: str | Path, *, argument: str = "pretrained", **hub: Any) -> nn.Module:
    """Loads a decoder model in float32, with weights rounded to BF16 values.

    ``argument`` is the name of the argument in error messages. ``hub``: revision, subfolder, trust_remote_code.

    Raises:
        UserError: with a message of one line, for a missing directory, a directory without a config, an
            encoder-decoder model, a quantised model, an adapter among the files, weights that are missing, that have
            another shape than in the config, or that are NaN or infinite, and without network access.
    """
    # 1. Check the configuration before anything large is read.
    config = load_config(pretrained, argument=argument, **hub)
    check_decoder(config, f"{argument}={str(pretrained)!r}")
    if method := quantisation_method(config):
        raise UserError(
            f"{argument}={str(pretrained)!r}: weights are already packed ({method}); pass the unquantised model"
        )
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

    local = find_place(pretrained, argument)
    inside = local / hub.get("subfolder", "")
    if local.is_dir() and not (inside / "config.json").is_file():
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
        return AutoConfig.from_pretrained(expand_path(pretrained), **_without_code_prompt(hub))
    except Exception as error:  # hub client, JSON and configuration errors have no common base
        reason = describe_hub_error(error, pretrained, hub.get("revision"))
        raise UserError(f"{argument}={str(pretrained)!r}: its config could not be read ({reason})") from None


def load_tokenizer(source: str | Path, **hub: Any) -> Any:
    """Loads the tokenizer of a directory or hub id; ``hub`` as in ``load_causal_lm``.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

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
