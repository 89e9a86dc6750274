"""Merges adapters into models. Every merge of the package is done here and compared with the adapter itself."""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.finetune.adapter import find_adapter, fit_vocabulary, load_adapter_config, tensor_shapes, trained_tokens
from lm_ortho.finetune.loading import check_finite, round_to_bf16
from lm_ortho.finetune.lora import suppress_peft_warnings
from lm_ortho.finetune.merge_check import LogitChange, WeightChange, check_logits, draw_probe_ids, matrices, probe
from lm_ortho.hub import describe_hub_error

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

SMALL_SURVIVING_SHARE, LARGE_ROUNDING_ERROR = 0.75, 0.5
"""Share of the change of weights that rounding to BF16 leaves, and error of the logits as a share of theirs: below
the first, or above the second, a warning says that much of the adapter is lost."""


@dataclass(frozen=True)
class MergedAdapter:
    """A model with an adapter merged in BF16 values, and what the merge changed. ``source`` names the adapter."""

    model: nn.Module
    change: WeightChange
    effect: LogitChange
    source: str

    def describe(self) -> str:
        """One line: weights changed, logits changed, and how much of both rounding to BF16 leaves."""
        change, effect = self.change, self.effect
        changed = f"{change.changed:,} of {change.weights:,} weights changed ({change.changed / change.weights:.1%})"
        logits = f"logits by {effect.mean:.2g} on average, {effect.largest:.2g} at most"
        left = f"{change.surviving_share:.0%} of the change of the weights"
        error = f"an error of {effect.rounding_error:.0%} in that of the logits"
        return f"{changed}, {logits}; rounding to BF16 leaves {left}, with {error}"

    def check_effect(self) -> None:
        """Logs a warning if rounding lost much of the adapter.

        Raises:
            UserError: if no weight has changed.
        """
        change, effect = self.change, self.effect
        if not change.changed:
            reason = (
                "all that it adds is below the resolution of BF16, in which weights are merged; train it longer or "
                "with a larger rate"
                if change.norm
                else "all that it adds is zero, as before training or after one that failed; train it again"
            )
            raise UserError(f"{self.source}: the adapter changes no weight of the model: {reason}")
        if change.surviving_share < SMALL_SURVIVING_SHARE or effect.rounding_error > LARGE_ROUNDING_ERROR:
            log.warning(
                "%s: the adapter changes so little that rounding to BF16 loses much of it (%.0f%% of the change of the "
                "weights is left, with an error of %.0f%% in that of the logits); what it taught may be lost, so train "
                "it with a larger effect",
                self.source,
                100 * change.surviving_share,
                100 * effect.rounding_error,
            )


def merge_adapter(model: nn.Module, peft: str | Path) -> nn.Module:
    """Merges the adapter into ``model`` in place, rounds the weights to BF16 values and returns the model.

    Raises:
        UserError: as ``merge_with_report``.
    """
    return merge_with_report(model, peft).model


def merge_with_report(model: nn.Module, peft: str | Path, tokens: int = 0) -> MergedAdapter:
    """Merges the adapter into ``model`` in place, rounds the weights to BF16 values, and measures what has changed.

    The vocabulary of ``model`` is resized if the adapter needs it; ``tokens`` is the length of its tokenizer
    (``fit_vocabulary``). Weights that two layers share are separated where the adapter changes them differently.

    Raises:
        UserError: if the adapter cannot be read, does not fit the model, has NaN or infinite weights, is of a kind
            that cannot be merged, or is merged wrongly by peft.
    """
    source = f"peft={str(peft)!r}"
    config = load_adapter_config(peft)
    _warn_of_another_base(model, config, source)
    fit_vocabulary(model, peft, tokens)
    ids = draw_probe_ids(model, trained_tokens(config))
    plain_logits = probe(model, ids)
    # 1. Load it. Vectors, and tensors that are stored for a whole parameter, may change now: copy them before. So may
    # every matrix with an initialisation from its own values (PiSSA, OLoRA, ...), which takes a part of it away.
    stored = {name.removeprefix("base_model.model.") for name in tensor_shapes(peft)}
    is_rewritten = str(getattr(config, "init_lora_weights", True)).lower() not in _PLAIN_INITIALISATIONS
    before = {
        name: parameter.detach().bfloat16()
        for name, parameter in model.named_parameters()
        if is_rewritten or parameter.dim() < 2 or name in stored
    }
    peft_model = _load_adapter(model, str(peft))
    unwrapped = {name for name, _ in peft_model.get_base_model().named_parameters()}
    # 2. Merge it.
    try:
        merged_model, change, live_logits = merge_peft_model(peft_model, ids, source, plain_logits=plain_logits)
    except UserError:
        raise
    except Exception as error:  # the tuners of peft raise many kinds
        raise UserError(f"{source}: could not be merged ({describe_hub_error(error, peft)})") from None
    parameters = dict(merged_model.named_parameters())
    if is_rewritten:
        change = WeightChange(change.weights)
    else:  # wrapped matrices are measured while they are merged
        before = {name: tensor for name, tensor in before.items() if tensor.dim() < 2 or name in unwrapped}
    change.add(before, {name: parameters[name].detach() for name in before if name in parameters})
    # 3. Round, and measure what is left.
    round_to_bf16(merged_model).eval()
    effect = LogitChange.measure(plain_logits, live_logits, probe(merged_model, ids))
    return MergedAdapter(merged_model, change, effect, source)


class MergeResult(NamedTuple):
    """A merged model, not rounded, how its weights changed, and the logits that it had with its adapter."""

    model: nn.Module
    change: WeightChange
    live_logits: Tensor


def merge_peft_model(peft_model: Any, ids: Tensor, source: str, *, plain_logits: Tensor | None = None) -> MergeResult:
    """Merges the adapter of ``peft_model`` in place, without rounding.

    Logits on ``ids`` (rows, tokens) are compared before and after. ``source`` begins error messages; ``plain_logits``
    are those without the adapter, computed here if they are missing.

    Raises:
        UserError: if the merged model computes something else.
    """
    kind = str(getattr(peft_model.peft_config["default"].peft_type, "value", ""))
    peft_model.eval()
    with _merging_warnings_suppressed():
        # 1. Logits without and with the adapter.
        if plain_logits is None:
            with peft_model.disable_adapter():
                plain_logits = probe(peft_model, ids)
        live_logits = probe(peft_model, ids)
        # 2. Give each layer weights of its own, so that no change is applied to two layers.
        was_tied = bool(getattr(peft_model.get_base_model().config, "tie_word_embeddings", False))
        shared = _separate_shared_weights(peft_model)
        # 3. Merge layer by layer, to measure the change with a copy of one layer at a time.
        changes = _merge_layers(peft_model)
        merged_model: Any = peft_model.merge_and_unload()
    # 4. Share again what stayed equal, and record in the config whether the embeddings are still tied.
    for module in _share_equal_weights(shared):
        changes.pop(id(module), None)  # the change of one weight, counted once
    if was_tied:
        _record_tied_embeddings(merged_model)
    # 5. Compare.
    check_logits(plain_logits, live_logits, probe(merged_model, ids), source=source, kind=kind)
    change = sum(changes.values(), WeightChange(sum(parameter.numel() for parameter in merged_model.parameters())))
    return MergeResult(merged_model, change, live_logits)


_PLAIN_INITIALISATIONS = {"true", "false", "gaussian", "orthogonal", "eva"}
"""Initialisations of LoRA that leave the weights of the model as they are."""
_SHARED_TENSORS = ("vblora_vector_bank", "prompt_encoder", "tinylora_v", "unilora_theta_d")
"""Parts of the names of tensors that all layers of an adapter share; peft reports them as missing without need."""


def _load_adapter(model: nn.Module, peft: str) -> Any:
    """The model with its adapter as a ``PeftModel``; raises ``UserError`` for an adapter that does not fit."""
    from peft import PeftModel

    source = find_adapter(peft)
    try:
        # Load it twice: only ``load_adapter`` returns which tensors and layers did not match.
        with suppress_peft_warnings(), warnings.catch_warnings(), _compilers_restored():
            warnings.filterwarnings("ignore", message="(?s).*missing adapter keys")  # reported below, as an error
            warnings.filterwarnings("ignore", message="(?s).*tie_word_embeddings")  # separated before the merge
            peft_model = PeftModel.from_pretrained(model, source)
            load_result = peft_model.load_adapter(source, "default")
        _check_adapter_fits(peft_model, load_result, source, f"peft={peft!r}")
    except UserError:
        raise
    except KeyError as error:  # the wrappers of whole modules look for their tensors by name
        raise UserError(f"peft={peft!r}: it lacks the tensor {error.args[0]!r:.120} that its config requires") from None
    except Exception as error:  # peft, hub and safetensors errors have no common base
        raise UserError(f"peft={peft!r}: could not be merged ({describe_hub_error(error, peft)})") from None
    return peft_model


def _check_adapter_fits(peft_model: nn.Module, load_result: Any, location: str, source: str) -> None:
    """Raises ``UserError`` for adapter tensors without a layer, adapted layers without a tensor, and NaN weights."""
    if unexpected := _without_copies(load_result.unexpected_keys, location):
        raise UserError(
            f"{source}: {len(unexpected)} of its tensors fit no layer of the model, first {unexpected[0]}; it belongs "
            "to another model"
        )
    if missing := [name for name in load_result.missing_keys if not any(part in name for part in _SHARED_TENSORS)]:
        raise UserError(
            f"{source}: it lacks {len(missing)} of the tensors that its config and the model require, first "
            f"{missing[0]}; it belongs to another model, or its tensors were renamed"
        )
    check_finite(peft_model, source)


def _without_copies(unexpected: Sequence[str], location: str) -> list[str]:
    """The names in ``unexpected`` without those of tensors that are stored under another name, which was loaded, too.

    peft writes such copies of embeddings if the vocabulary was resized before training.
    """
    if not unexpected:
        return []
    from peft.utils import load_peft_weights

    tensors = load_peft_weights(location, device="cpu")
    loaded = [tensor for name, tensor in tensors.items() if name not in unexpected]
    return [
        name
        for name in unexpected
        if name not in tensors or not any(torch.equal(tensors[name], tensor) for tensor in loaded)
    ]


def _warn_of_another_base(model: Any, config: Any, source: str) -> None:
    """Logs a warning where adapter and model both come from the hub, and the adapter names another model."""
    trained_on, name = str(config.base_model_name_or_path or ""), str(getattr(model.config, "_name_or_path", ""))
    are_hub_names = all(part.count("/") == 1 and part[0] not in "./~" for part in (trained_on, name) if part)
    if trained_on and name and are_hub_names and not Path(name).is_dir() and trained_on.lower() != name.lower():
        log.warning("%s: the adapter was trained on %s and is merged into %s", source, trained_on, name)


@contextmanager
def _compilers_restored() -> Iterator[None]:
    """Context that leaves the environment variables ``CC`` and ``CXX`` as they were.

    peft compiles a CUDA extension for BOFT with both set to ``gcc`` and leaves them so if that fails. ``gcc`` does not
    link the standard library of C++, which the CPU kernel needs.
    """
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _merging_warnings_suppressed() -> Iterator[None]:
    """Context without the warnings of peft about what is checked or handled here."""
    with warnings.catch_warnings():
        for message in ("All adapters are already merged", "(?s).*tie_word_embeddings", "Careful, disabling adapter"):
            warnings.filterwarnings("ignore", message=message)
        yield


def _separate_shared_weights(peft_model: Any) -> list[list[tuple[nn.Module, str]]]:
    """Gives every layer but the first its own copy of a weight that an adapter changes in one of them.

    Returns the layers and parameter names that shared each weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = peft_model.get_base_model()
    adapted = {id(module.get_base_layer()) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    owners = defaultdict[int, list[tuple[nn.Module, str]]](list)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append((module, name))
    groups = [
        group for group in owners.values() if len(group) > 1 and any(id(module) in adapted for module, _ in group)
    ]
    for group in groups:
        for module, name in group[1:]:
            parameter = getattr(module, name)
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    return groups


def _share_equal_weights(groups: list[list[tuple[nn.Module, str]]]) -> list[nn.Module]:
    """Lets layers share a weight again that is the same in all of them; returns those that use that of another one."""
    followers = []
    for group in groups:
        (first_module, first_name), *others = group
        first = getattr(first_module, first_name)
        if all(torch.equal(first, getattr(module, name)) for module, name in others):
            for module, name in others:
                setattr(module, name, first)
                followers.append(module)
    return followers


def _record_tied_embeddings(model: Any) -> None:
    """Sets ``tie_word_embeddings`` of a config that had it to whether the embeddings still share their weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is None or head.weight is embedding.weight
    model.config.tie_word_embeddings = is_tied
    text_config = model.config.get_text_config()
    if hasattr(text_config, "tie_word_embeddings"):
        text_config.tie_word_embeddings = is_tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _merge_layers(peft_model: Any) -> dict[int, WeightChange]:
    """Merges every adapted layer in place; returns the change of its matrices by the id of the layer.

    Modules that are replaced as a whole are only compared.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    changes, adapters = dict[int, WeightChange](), defaultdict[int, list[Any]](list)
    for module in peft_model.get_base_model().modules():
        if isinstance(module, BaseTunerLayer):  # several may wrap one layer, one for each of its parameters
            adapters[id(module.get_base_layer())].append(module)
        elif isinstance(module, ModulesToSaveWrapper):
            new = matrices(module.modules_to_save[module.active_adapters[0]])
            weight_id = min((tensor.data_ptr() for tensor in new.values()), default=0)  # equal where weights are tied
            changes[weight_id] = WeightChange()
            changes[weight_id].add(matrices(module.original_module), new)
    for layer_id, modules in adapters.items():
        before = {name: matrix.clone() for name, matrix in matrices(modules[0].get_base_layer()).items()}
        for module in modules:
            module.merge()
        changes[layer_id] = WeightChange()
        changes[layer_id].add(before, matrices(modules[0].get_base_layer()))
    return changes
