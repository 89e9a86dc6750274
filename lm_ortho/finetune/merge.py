"""Loading a model and merging a LoRA adapter into it, in BF16."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_ortho.errors import UserError
from lm_ortho.finetune.lora import without_notices
from lm_ortho.hub import describe_hub_error, first_line


def round_to_bf16(model: nn.Module) -> nn.Module:
    """The same model with every floating-point parameter rounded to a BF16 value, still stored in its own dtype."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(parameter.bfloat16())
    return model


def load_causal_lm(pretrained: str | Path, *, argument: str = "pretrained", **hub: Any) -> nn.Module:
    """A decoder model in float32 whose weights are BF16 values. ``hub``: revision, trust_remote_code.

    ``argument`` is what errors call it.

    Raises:
        UserError: one line for a missing directory, a directory without a config, an encoder-decoder model, a
            model that is already quantised, an adapter among the files, weights that are missing, of another shape
            than the config says, NaN or infinite, no network.
    """
    config = load_config(pretrained, argument=argument, **hub)
    check_decoder(config, f"{argument}={str(pretrained)!r}")
    if method := quantisation_method(config):
        raise UserError(
            f"{argument}={str(pretrained)!r}: weights are already packed ({method}); pass the unquantised model"
        )
    from transformers import AutoModelForCausalLM

    try:
        model, read = AutoModelForCausalLM.from_pretrained(
            expand_path(pretrained),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with names and shapes
            **_unasked(hub),
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        told = describe_hub_error(error, pretrained, hub.get("revision"))
        raise UserError(f"{argument}={str(pretrained)!r}: could not be loaded ({told})") from None
    except Exception as error:  # safetensors has error classes of its own for damaged files
        raise UserError(f"{argument}={str(pretrained)!r}: weights are damaged ({first_line(error)})") from None
    _check_read(model, read, f"{argument}={str(pretrained)!r}")
    check_finite(model, f"{argument}={str(pretrained)!r}")
    return round_to_bf16(model).eval()


def _check_read(model: nn.Module, read: Mapping[str, Any], named: str) -> None:
    """Raises ``UserError`` where a weight of the model did not come from its files: it would be a random one."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{named}: an adapter lies among the model's files and is not merged; move its adapter_config.json and "
            "adapter_model.safetensors elsewhere and give that place as peft="
        )
    for name, held, wanted in sorted(read.get("mismatched_keys", ())):
        raise UserError(
            f"{named}: {name} is {_shape(held)} in the files and {_shape(wanted)} by the config; one of them is of "
            "another model"
        )
    if missing := sorted(read.get("missing_keys", ())):
        raise UserError(
            f"{named}: the files lack {len(missing)} weights of {type(model).__name__}, first {missing[0]}; they would "
            "be random, so complete the files or correct the config"
        )


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))


def check_finite(model: nn.Module, named: str) -> None:
    """Raises ``UserError`` for NaN or infinite weights; ``named`` begins the message."""
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if bad:
        raise UserError(f"{named}: {len(bad)} weights hold NaN or infinite values, first {bad[0]}")


def load_config(pretrained: str | Path, *, argument: str = "pretrained", **hub: Any) -> Any:
    """The model's configuration; ``UserError`` as in ``load_causal_lm``."""
    from transformers import AutoConfig

    local = Path(str(pretrained)).expanduser()
    inside = local / hub.get("subfolder", "")
    if local.is_dir() and not (inside / "config.json").is_file():
        where = f"subfolder {hub['subfolder']!r}" if hub.get("subfolder") else "directory"
        if (inside / "adapter_config.json").is_file():
            raise UserError(
                f"{argument}={str(pretrained)!r}: the {where} holds an adapter, not the model it belongs to"
            )
        raise UserError(f"{argument}={str(pretrained)!r}: the {where} holds no config.json")
    if not local.is_dir() and (local.is_absolute() or str(pretrained).startswith((".", "~"))):
        raise UserError(f"{argument}={str(pretrained)!r}: no such directory")
    if local.is_dir() and hub.get("revision") not in (None, "main"):
        raise UserError(
            f"revision={hub['revision']!r}: {argument}={str(pretrained)!r} is a directory, which has no revisions; "
            "leave it out, or give the model's name on the hub"
        )
    try:
        return AutoConfig.from_pretrained(expand_path(pretrained), **_unasked(hub))
    except Exception as error:  # hub client, JSON and configuration errors have no common base
        told = describe_hub_error(error, pretrained, hub.get("revision"))
        raise UserError(f"{argument}={str(pretrained)!r}: its config could not be read ({told})") from None


def load_tokenizer(place: str | Path, **hub: Any) -> Any:
    """The tokenizer of a directory or hub id; ``UserError`` where there is none. ``hub`` as in ``load_causal_lm``."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(expand_path(place), **_unasked(hub))
    except Exception as error:  # hub client, JSON and tokenizer errors have no common base
        told = describe_hub_error(error, place, hub.get("revision"))
        raise UserError(
            f"tokenizer={str(place)!r} could not be loaded ({told}); name the directory or hub id of one"
        ) from None


def check_decoder(config: Any, named: str) -> None:
    """Raises ``UserError`` for the configuration of an encoder-decoder model; ``named`` begins the message."""
    if getattr(config, "is_encoder_decoder", False):
        kind = getattr(config, "model_type", type(config).__name__)
        raise UserError(f"{named}: {kind} is an encoder-decoder model; a decoder is needed")


def quantisation_method(config: Any) -> str:
    """The method that packed a model's weights, by its configuration; empty for one that is not quantised."""
    packed = getattr(config, "quantization_config", None)
    if packed is None:
        return ""
    return str(packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", packed))


def expand_path(named: str | Path) -> str:
    """A path that is there, with ``~`` written out; a name as it is."""
    local = Path(str(named)).expanduser()
    return str(local) if local.exists() else str(named)


def _unasked(hub: dict[str, Any]) -> dict[str, Any]:
    """Without this default transformers asks on the terminal whether to run a model's own code."""
    return {"trust_remote_code": False, **hub}


def merge_adapter(model: nn.Module, peft: str | Path) -> nn.Module:
    """``model`` with the adapter merged into it (in place), rounded to BF16 values.

    Raises:
        UserError: when the adapter cannot be read, does not fit the model, or holds NaN or infinite weights.
    """
    from peft import PeftModel

    local = Path(str(peft)).expanduser()
    if (local.is_absolute() or local.is_dir()) and not (local / "adapter_config.json").is_file():
        raise UserError(f"peft={str(peft)!r}: no adapter_config.json there; expected a peft adapter directory")
    place = str(local) if local.is_dir() else str(peft)
    try:
        with without_notices():
            warnings.filterwarnings("ignore", message="(?s).*missing adapter keys")  # told below, as an error
            adapted = PeftModel.from_pretrained(model, place)
            read = adapted.load_adapter(place, "default")  # again: only this says what fitted
        _check_fits(adapted, read, str(peft))
        merged = adapted.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # peft, hub and safetensors errors have no common base
        raise UserError(f"peft={str(peft)!r}: could not be merged ({describe_hub_error(error, peft)})") from None
    return round_to_bf16(merged).eval()


_SHARED = ("vblora_vector_bank", "prompt_encoder", "tinylora_v", "unilora_theta_d")
"""In the names of tensors that all layers of an adapter share, which peft holds to be missing and does not need."""


def _check_fits(adapted: nn.Module, read: Any, peft: str) -> None:
    """Raises ``UserError`` where tensors of an adapter found no layer, or layers found no tensor, or for NaN."""
    if stray := list(read.unexpected_keys):
        raise UserError(
            f"peft={peft!r}: {len(stray)} of its tensors fit no layer of the model, first {stray[0]}; it belongs to "
            "another model"
        )
    if missing := [name for name in read.missing_keys if not any(part in name for part in _SHARED)]:
        raise UserError(
            f"peft={peft!r}: it lacks {len(missing)} of the tensors that its config and the model ask for, first "
            f"{missing[0]}; it belongs to another model, or its names were changed"
        )
    check_finite(adapted, f"peft={peft!r}")
