"""Connects a freshly patched model to the checkpoint format.

A file of its own, because ``hf`` imports ``write``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lm_ortho.checkpoint.write import SavePretrainedGuard, quantization_settings
from lm_ortho.layer import get_streams


def attach(model: nn.Module, meta: dict[str, Any] | None = None) -> None:
    """Makes ``save_pretrained`` and ``push_to_hub`` of a freshly patched model write an lm-ortho checkpoint.

    Models that come from ``load`` or ``from_pretrained`` do so already.
    """
    from lm_ortho.checkpoint.hf import LibOrthoConfig, LibOrthoHfQuantizer  # imports transformers

    config = LibOrthoConfig(**quantization_settings(get_streams(model), meta or {}))
    model.hf_quantizer = LibOrthoHfQuantizer(config, meta=meta or {})
    transformers_config: Any = model.config
    transformers_config.quantization_config = config
    SavePretrainedGuard.install(model)
