"""Checks and preparations before a decomposition: rows, layers, base model, and the estimate of memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lm_ortho.calibration.activations import find_uncalled_layers
from lm_ortho.calibration.by_layer import LayerTensors
from lm_ortho.config import Recipe
from lm_ortho.data.chat import ChatRow, render_forms
from lm_ortho.data.encoding import Example, encode_rows
from lm_ortho.data.rows import Row, drop_forget_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune.loading import check_finite
from lm_ortho.layer.targets import find_linear
from lm_ortho.pipeline import resource_estimate
from lm_ortho.pipeline.model_lattice import group_by_block
from lm_ortho.runtime.offload import is_offloaded
from lm_ortho.runtime.progress import ProgressCallback

log = logging.getLogger(__name__)


@dataclass
class EncodedSets:
    """Forget and retain rows in the form of the prompts (plain or chat), and the same rows as token ids."""

    forget_rows: Sequence[Row | ChatRow]
    retain_rows: Sequence[Row | ChatRow]
    forget: list[Example]
    retain: list[Example]

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest row."""
        return max(len(example.ids) for example in [*self.forget, *self.retain])


def encode_sets(
    model: nn.Module, tokenizer: Any, forget: Sequence[Row], retain: Sequence[Row], *, recipe: Recipe
) -> EncodedSets:
    """Encodes both sets, without the retain rows that are forget rows.

    Raises:
        UserError: for an empty set, and for rows that the model cannot take.
    """
    if not forget:
        raise UserError("forget: the forget set is empty; give at least one row")
    if not retain:
        raise UserError("retain: the retain set is empty; give documents that must not change")
    remaining = drop_forget_rows(forget, retain)
    if len(remaining) < len(retain):
        duplicates = len(retain) - len(remaining)
        log.warning("retain: %d of %d rows are also forget rows and are left out", duplicates, len(retain))
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        log.warning("tokenizer: it has neither BOS nor EOS, so evaluations need prefix_token_id=ID in the model args")
    forget_rows = render_forms(forget, tokenizer, recipe.prompts, **recipe.chat_options)
    retain_rows = render_forms(remaining, tokenizer, recipe.prompts, **recipe.chat_options)
    return EncodedSets(
        forget_rows,
        retain_rows,
        forget=encode_rows(model, tokenizer, forget_rows, argument="forget"),
        retain=encode_rows(model, tokenizer, retain_rows, argument="retain"),
    )


def prepare_layers(
    model: nn.Module, targets: str, examples: Sequence[Example]
) -> tuple[dict[str, nn.Linear], list[str]]:
    """The layers to decompose, ready for gradients, and the names of those that the model reads without a call.

    Raises:
        UserError: for weights that are not float32, not finite or shared, and where no layer remains.
    """
    layers = find_linear(model, targets)
    _check_dtype(layers)
    check_finite(model, "pretrained")
    _check_unshared(layers)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    model.eval()
    uncalled = find_uncalled_layers(model, layers, min(examples, key=lambda example: len(example.ids)))
    for name in uncalled:
        layers.pop(name).weight.requires_grad_(False)
    if uncalled:
        log.warning(
            "%d layers are left alone, first %s: the model reads their weights without calling them",
            len(uncalled),
            uncalled[0],
        )
    if not layers:
        raise UserError(f"targets: the model reads the weights of {uncalled[0]} without calling the layer")
    return layers, uncalled


def _check_dtype(layers: Mapping[str, nn.Linear]) -> None:
    for name, layer in layers.items():
        if layer.weight.dtype != torch.float32:
            dtype = str(layer.weight.dtype).removeprefix("torch.")
            raise UserError(f"pretrained: layer {name} is {dtype}; decompose a float32 copy, model.float()")


def _check_unshared(layers: Mapping[str, nn.Linear]) -> None:
    """Raises ``UserError`` where two layers read one weight: each would get a base stream of its own."""
    owners = dict[int, str]()
    for name, layer in layers.items():
        if (owner := owners.setdefault(id(layer.weight), name)) != name:
            raise UserError(f"pretrained: layers {owner} and {name} share one weight; untie them before decomposition")


def read_base_weights(
    base_model: nn.Module | None, layers: Mapping[str, nn.Linear], examples: Sequence[Example]
) -> Mapping[str, Tensor] | None:
    """Weights of the base model by layer name, float32 on the CPU when they are read; None without a base model.

    Raises:
        UserError: for another architecture, and for a vocabulary that lacks a token of the ``examples``.
    """
    if base_model is None:
        return None
    check_finite(base_model, "base")
    modules, weights = dict(base_model.named_modules()), dict[str, Tensor]()
    for name, layer in layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != layer.weight.shape:
            raise UserError(f"base: layer {name} is missing or has another shape; base must be the same architecture")
        weights[name] = weight.detach()
    vocabulary = base_model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    highest = max(max(example.ids) for example in examples)
    if highest >= vocabulary:
        raise UserError(
            f"base: the rows have token {highest}, and the model before fine-tuning has {vocabulary}; resize its "
            "embeddings as the fine-tune did, or set base=none"
        )
    return LayerTensors(list(weights), lambda name: weights[name].float().cpu())


def report_memory_estimate(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    sets: EncodedSets,
    *,
    recipe: Recipe,
    base_known: bool,
    progress: ProgressCallback,
) -> None:
    """Reports the memory that the process will need, and the work; logs a warning if the memory is not available."""
    rows = [*sets.forget, *sets.retain]
    row_counts = resource_estimate.Rows(
        forget=len(sets.forget),
        retain=len(sets.retain),
        tokens=sum(len(row.ids) for row in rows) / len(rows),
        answer=sum(len(row.ids) - row.start for row in sets.forget) / len(sets.forget),
        batch_rows=recipe.batch_rows,
    )
    shape = model_shape(model, layers)
    # What the process holds now: its libraries, the models, and the BF16 copy of the decomposed weights.
    resident = psutil.Process().memory_info().rss
    models = 4 * shape.parameters * (2 if base_known else 1) + 2 * shape.weights
    on_host = device_type(model) == "cpu" or is_offloaded(model)
    overhead = max(0.0, resident - models) if on_host else 0.0
    needed = resource_estimate.estimate_memory(shape, row_counts, recipe, base_known, overhead)
    stage = max(needed, key=lambda name: needed[name])
    peak = needed[stage] / 1e9
    operations = sum(resource_estimate.estimate_operations(shape, row_counts, recipe, base_known).values())
    progress("memory", 1, 1, f"about {peak:.1f} GB at the peak ({stage}); work: about {operations:.1e} operations")
    available = (psutil.virtual_memory().available + resident) / 1e9
    if device_type(model) == "cuda" and not is_offloaded(model):
        available = torch.cuda.mem_get_info()[1] / 1e9
    if peak > available:
        log.warning(
            "recipe: %s needs about %.0f GB and %.0f GB are available; recompute=true, states=bfloat16 and groups=2 or "
            "more need less (docs/scaling.md)",
            stage,
            peak,
            available,
        )


def device_type(model: nn.Module) -> str:
    """The type of the device that the model is on."""
    return next(model.parameters()).device.type


def model_shape(model: nn.Module, layers: Mapping[str, nn.Linear]) -> resource_estimate.Shape:
    """The sizes from which ``resource_estimate`` computes memory and operations."""
    config: Any = model.config
    text_config = config.get_text_config()
    decomposed = sum(layer.weight.numel() for layer in layers.values())
    blocks = group_by_block(list(layers))
    widths = [tuple({layers[name].in_features: None for name in names}) for names in blocks.values()]
    return resource_estimate.Shape(
        layers=tuple((layer.out_features, layer.in_features) for layer in layers.values()),
        others=sum(parameter.numel() for parameter in model.parameters()) - decomposed,
        vocabulary=text_config.vocab_size,
        hidden=getattr(text_config, "hidden_size", max(layer.in_features for layer in layers.values())),
        blocks=len(blocks),
        inputs=tuple(width for block in widths for width in block),
    )
