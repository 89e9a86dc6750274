"""Small random models and streams for tests."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from lm_ortho.layer import OrthoLinear, alpha_scope, find_linear, patch, unpatch
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream, code_range


def llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Builds a 2-layer Llama of width 64 with 128 tokens; its parameters are float32 with BF16 values."""
    set_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **overrides,
    }
    return round_to_bf16(LlamaForCausalLM(LlamaConfig(**settings)))


def from_config(config: Any, seed: int = 0) -> nn.Module:
    """Builds a random model of another architecture."""
    set_seed(seed)
    return round_to_bf16(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def round_to_bf16(model: Any) -> Any:
    """Rounds every parameter in place to a BF16 value, stored in its own dtype; returns the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model.eval()


def layer_streams(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 64,
    *,
    density: float = 0.05,
    bias: Tensor | None = None,
    seed: int = 0,
    with_ortho: bool = True,
) -> LayerStreams:
    """Splits ``weight`` into a base stream, by rounding, and an ortho stream with the error on a random support."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 16:
        base = BaseStream.from_weight(weight * 0.5, group_size)
    else:
        low, high = code_range(bits)
        padded_weight = nn.functional.pad(weight, (0, -weight.shape[1] % group_size))
        groups = padded_weight.view(weight.shape[0], -1, group_size)
        scales = (groups.abs().amax(-1) / high).clamp(min=1e-6).to(torch.bfloat16)
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(low, high).to(torch.int8)
        codes = codes.view(weight.shape[0], -1)[:, : weight.shape[1]]
        base = BaseStream.from_codes(codes, scales, bits, group_size=group_size)
    if not with_ortho:
        return LayerStreams(base, None, bias)
    support = torch.rand(weight.shape, generator=generator) < density
    # Random noise far above the rounding error, so that alpha changes the output of the model.
    delta = weight - base.dequantise() + torch.randn(weight.shape, generator=generator) * weight.abs().mean()
    return LayerStreams(base, OrthoStream.from_dense(delta, support), bias)


def standalone_layer(
    out_features: int = 24,
    in_features: int = 40,
    bits: int = 4,
    density: float = 0.2,
    bias: bool = True,
    seed: int = 0,
) -> tuple[OrthoLinear, LayerStreams]:
    """Builds a layer with random weights, outside of any model; returns it with its streams."""
    torch.manual_seed(seed)
    weight = torch.randn(out_features, in_features)
    bias_vector = torch.randn(out_features) if bias else None
    streams = layer_streams(weight, bits, group_size=8, density=density, bias=bias_vector, seed=seed)
    return OrthoLinear.from_streams(streams), streams


def model_streams(model: nn.Module, **settings: Any) -> dict[str, LayerStreams]:
    """Builds streams for every linear layer of ``model``."""
    return {
        name: layer_streams(
            linear.weight.detach(),
            bias=None if linear.bias is None else linear.bias.detach(),
            seed=i,
            **settings,
        )
        for i, (name, linear) in enumerate(find_linear(model).items())
    }


def patched_model(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """Builds a patched model at alpha 0."""
    model = llama() if model is None else model
    patch(model, model_streams(model, **settings))
    return model


def unpatched_model(model: nn.Module, alpha: float) -> nn.Module:
    """Returns a copy of a patched model with plain linear layers whose weights are those at ``alpha``."""
    model = copy.deepcopy(model)
    unpatch(model, alpha)
    return model


def logits(model: nn.Module, rows: int = 3, length: int = 7, **kwargs: Any) -> Tensor:
    """Returns the logits of ``model`` for fixed random tokens."""
    with torch.no_grad():
        return model(tokens(rows, length), **kwargs).logits


def logits_at(model: nn.Module, alpha: Any, **kwargs: Any) -> Tensor:
    """Returns the logits for the same tokens at ``alpha``, which is one number or one per row."""
    with alpha_scope(alpha):
        return logits(model, **kwargs)


def tokens(rows: int = 3, length: int = 7, seed: int = 5) -> Tensor:
    """Returns random token ids (rows, length)."""
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(seed))
