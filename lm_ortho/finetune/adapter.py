"""Reads the configuration of an adapter: refuses kinds that cannot be merged, and finds the vocabulary it needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_ortho.errors import UserError
from lm_ortho.finetune.loading import find_place
from lm_ortho.hub import describe_hub_error

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_TOKENIZER_FILE = "tokenizer_config.json"
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Files without which transformers makes an empty tokenizer of a ``tokenizer_config.json``."""
_NOT_IN_WEIGHTS = {
    "ADAPTION_PROMPT": "it adds virtual tokens to the attention",
    "CARTRIDGE": "it adds keys and values to the cache",
    "POLY": "it selects among several adapters by the task",
    "SHADOW": "what it changes depends on the input",
    "XLORA": "it weighs several adapters by the input",
}
"""PEFT types whose effect is not a change of weights, and what they do instead. Prompt learning is known to peft."""
_MAX_SHRINKAGE = 0.01
"""Largest share of a vocabulary that an adapter may cut off: padding rows, which a fine-tune often drops."""


def find_adapter(peft: str | Path) -> str:
    """The local directory of an adapter with ``~`` expanded, or its name on the hub.

    Raises:
        UserError: for a local path without an adapter; names the adapters in its folders, if there are any.
    """
    local = find_place(peft, "peft")
    if (local.is_absolute() or local.is_dir()) and not (local / CONFIG_FILE).is_file():
        message = f"peft={str(peft)!r}: no {CONFIG_FILE} there; expected a peft adapter directory"
        if folders := sorted(file.parent.name for file in local.glob(f"*/{CONFIG_FILE}")):
            message += f"; give one of its folders, which hold {len(folders)}: {', '.join(folders[:8])}"
        raise UserError(message)
    return str(local) if local.is_dir() else str(peft)


def find_adapter_tokenizer(peft: str | Path) -> str | None:
    """The directory of an adapter, if it holds a tokenizer as well; None for one on the hub."""
    local = find_place(peft, "peft")
    has_files = (local / CONFIG_FILE).is_file() and (local / _TOKENIZER_FILE).is_file()
    has_vocabulary = has_files and any(any(local.glob(pattern)) for pattern in _VOCABULARIES)
    return str(local) if has_vocabulary else None


def load_adapter_config(peft: str | Path) -> Any:
    """The ``PeftConfig`` of an adapter that can be merged into weights.

    Raises:
        UserError: if it cannot be read; for prompt learning and other kinds that are no change of weights.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(find_adapter(peft))
    except UserError:
        raise
    except Exception as error:  # peft and hub errors have no common base
        raise UserError(f"peft={str(peft)!r}: could not be merged ({describe_hub_error(error, peft)})") from None
    _check_mergeable(config, str(peft))
    return config


def _check_mergeable(config: Any, peft: str) -> None:
    """Raises ``UserError`` for kinds of adapters whose effect weights cannot have."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    way_out = "a memory is decomposed from weights, so train it with LoRA or in full"
    reason = "it trains virtual tokens or their keys and values" if config.is_prompt_learning else ""
    if reason := _NOT_IN_WEIGHTS.get(kind, reason):
        raise UserError(f"peft={peft!r}: {kind} cannot be merged into the weights of any model: {reason}; {way_out}")
    if getattr(config, "alora_invocation_tokens", None):
        raise UserError(
            f"peft={peft!r}: an activated LoRA (alora_invocation_tokens) acts only after its invocation tokens, which "
            f"merged weights cannot do; {way_out}"
        )
    if getattr(config, "arrow_config", None):
        raise UserError(f"peft={peft!r}: an Arrow router selects adapters by the input, so it cannot be merged")
    if getattr(config, "layer_replication", None):
        raise UserError(
            f"peft={peft!r}: layer_replication makes layers that share their weights, with a change each, so the "
            "result is another architecture than pretrained; give its merged weights as pretrained="
        )
    if getattr(config, "megatron_config", None):
        raise UserError(f"peft={peft!r}: megatron_config: its layers are cut across devices; convert it to plain LoRA")


def fit_vocabulary(model: nn.Module, peft: str | Path, tokens: int = 0) -> int | None:
    """Resizes the vocabulary of ``model`` in place to what the adapter's tensors need; returns the new size, or None.

    An adapter that was trained with added tokens stores the whole embedding or the rows of these tokens. One that
    stores neither gets as many rows as its tokenizer has ``tokens``, if those are more. New rows are the mean of the
    others: the adapter replaces them, and a base model knows nothing about them.

    Raises:
        UserError: for an adapter whose vocabulary is much smaller, which belongs to another model.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = int(embedding.weight.shape[0])
    # 1. The size that stored embeddings have; else as many rows as added tokens need.
    config = load_adapter_config(peft)
    shapes = tensor_shapes(peft)
    size = _stored_vocabulary(model, shapes) or max(rows, tokens, 1 + max(trained_tokens(config), default=-1))
    if size == rows:
        return None
    if size < rows * (1 - _MAX_SHRINKAGE):
        raise UserError(
            f"peft={str(peft)!r}: its vocabulary has {size} tokens, and that of the model {rows}; it belongs to "
            "another model"
        )
    # 2. Resize, without the random rows of transformers: the same call must give the same weights.
    means = [head.weight.detach().mean(0) for head in _vocabulary_modules(model)]
    model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
    with torch.no_grad():
        for head, mean in zip(_vocabulary_modules(model), means, strict=True):
            head.weight[rows:] = mean.bfloat16().to(head.weight.dtype)
            if getattr(head, "bias", None) is not None:
                head.bias[rows:] = 0
    model.requires_grad_(False)
    log.info("peft: vocabulary of %d tokens resized to %d, as the adapter needs", rows, size)
    return size


def trained_tokens(config: Any) -> list[int]:
    """The ids of single tokens whose embeddings an adapter trained."""
    indices = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    return [i for part in indices.values() for i in part] if isinstance(indices, Mapping) else list(indices)


def _vocabulary_modules(model: Any) -> list[Any]:
    """The embedding and, if it has a weight of its own, the LM head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head is None or head.weight is embedding.weight else [embedding, head]


def _stored_vocabulary(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of tokens by the shapes of tensors for embedding or LM head; None if the adapter has none."""
    axes = (
        (model.get_input_embeddings(), {"lora_embedding_A": 1, "weight": 0}),
        (model.get_output_embeddings(), {"lora_B.weight": 0, "weight": 0}),
    )
    names = {id(module): name for name, module in model.named_modules()}
    for module, axis_by_suffix in axes:
        prefix = f"base_model.model.{names.get(id(module), '')}."
        for key, shape in shapes.items():
            rest = key.removeprefix(prefix)
            for wrapper in ("token_adapter.", "original_module.", "modules_to_save.", "base_layer."):
                rest = rest.removeprefix(wrapper)
            if key.startswith(prefix) and rest in axis_by_suffix and len(shape) == 2:
                return shape[axis_by_suffix[rest]]
    return None


def tensor_shapes(peft: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by name, from the header of its file where that is possible.

    Raises:
        UserError: if they cannot be read.
    """
    from peft.utils import load_peft_weights
    from safetensors import safe_open

    source = find_adapter(peft)
    try:
        if (file := Path(source) / TENSOR_FILE).is_file():
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        return {name: tuple(tensor.shape) for name, tensor in load_peft_weights(source, device="cpu").items()}
    except Exception as error:  # hub, pickle and safetensors errors have no common base
        raise UserError(f"peft={str(peft)!r}: could not be merged ({describe_hub_error(error, peft)})") from None
