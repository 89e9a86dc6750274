"""LoRA of peft on decomposed models, for ``get_peft_model``, ``PeftModel.from_pretrained`` and ``add_adapter``.

An adapter is trained beside the streams, which never change: its term is added to the product of a two-stream layer at
whatever alpha the call has. ``register`` extends peft as peft itself does for the layers of other quantisers. It runs
when peft is imported (``lm_ortho.plugin``) and when a checkpoint is loaded. The start-up hook imports this file while
peft is being imported, so it imports from submodules only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lm_ortho.errors import UserError
from lm_ortho.layer import OrthoLinear

_ALL_LINEAR = "all-linear"
_RANDOM_STARTS = (True, False, "gaussian")
"""The values of ``init_lora_weights`` that neither read nor change the weights of the base layer."""
_MARK = "_lm_ortho_bridged"
_ADVICE = "use plain LoRA, or `lm-ortho export` the checkpoint at one alpha and adapt that plain model"


class LoraOrthoLinear(Linear):
    """A LoRA adapter on an ``OrthoLinear``: ``y = base_layer(x) + scaling * B A x``, with gradients for A and B only.

    Merging is refused: W(alpha) is another matrix at every alpha, and its base stream has codes of a few bits, which
    cannot take up a dense change.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer: Any = module
        return layer.in_features, layer.out_features

    @property
    def lora_variants(self) -> dict[tuple[()], None]:
        """The variants of LoRA that peft may look up here: the plain one."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **options: Any) -> None:
        """Adds an adapter. Raises ``UserError`` for a variant of LoRA that needs one dense weight."""
        check_config(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)
        # A and B have the same form for the transposed weights of a Conv1D, and the streams are never transposed.
        self.fan_in_fan_out = False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ``UserError``."""
        _refuse_merge()


def check_config(config: LoraConfig) -> None:
    """Checks that an adapter of this configuration can be added to a two-stream layer.

    Raises:
        UserError: for a variant or an initialisation that reads or changes one dense weight.
    """
    if config.init_lora_weights not in _RANDOM_STARTS:
        raise UserError(
            f"init_lora_weights={config.init_lora_weights!r} is not possible for a decomposed model, whose layers have "
            "no dense weight to start from; use True or 'gaussian'"
        )
    for field in fields(config):
        is_variant = field.metadata.get("is_lora_variant") or field.name == "use_qalora"
        if is_variant and getattr(config, field.name):
            raise UserError(f"{field.name} of LoraConfig is not possible for a decomposed model; {_ADVICE}")


def _refuse_merge() -> None:
    raise UserError(
        "an adapter cannot be merged into a decomposed model, whose base stream has codes of a few bits; keep it "
        "beside the model (save_pretrained writes it, unload() removes it), or `lm-ortho export` the checkpoint at one "
        "alpha, load the adapter onto that plain model and merge it there"
    )


def register() -> None:
    """Makes peft put ``LoraOrthoLinear`` on two-stream layers; a second call changes nothing."""
    _wrap(LoraModel, "_create_new_module", _create_new_module, staticmethod)
    _wrap(LoraModel, "_check_merge_allowed", _check_merge_allowed)
    _wrap(tuners_utils, "_maybe_include_all_linear_layers", _include_all_linear)


def _wrap(
    owner: Any, name: str, replacement: Callable[..., Any], kind: Callable[[Any], Any] = lambda function: function
) -> None:
    """Replaces a function of ``owner`` by ``replacement``, which gets the original one as its first argument."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(call, _MARK, True)
    setattr(owner, name, kind(call))


def _create_new_module(
    original: Callable[..., nn.Module], config: LoraConfig, adapter_name: str, target: nn.Module, **options: Any
) -> nn.Module:
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base_layer, OrthoLinear) or type(base_layer) in (config._custom_modules or {}):
        return original(config, adapter_name, target, **options)
    return LoraOrthoLinear(target, adapter_name, config=config, **options)


def _check_merge_allowed(original: Callable[..., None], lora_model: LoraModel) -> None:
    """Refuses before the first layer is merged, so that a plain layer of the same adapter is not merged either."""
    if any(isinstance(module, LoraOrthoLinear) for module in lora_model.model.modules()):
        _refuse_merge()
    original(lora_model)


def _include_all_linear(original: Callable[..., Any], config: Any, model: nn.Module) -> Any:
    """Lets ``target_modules="all-linear"`` mean the two-stream layers, too."""
    targets = getattr(config, "target_modules", None)
    config = original(config, model)
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        config.target_modules |= {
            name
            for name, module in model.named_modules()
            if isinstance(module, OrthoLinear) and not name.endswith(".base_layer")
        }
    return config


register()  # also here: the start-up hook cannot call it while this module is importing peft
