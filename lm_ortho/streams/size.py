"""The size of a decomposed model, counted from its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from lm_ortho.streams.layer_streams import LayerStreams


def stored_bytes(streams: Mapping[str, LayerStreams]) -> int:
    """Bytes of all streams of the decomposed layers."""
    return sum(layer.nbytes() for layer in streams.values())


def bits_per_weight(streams: Mapping[str, LayerStreams]) -> float:
    """Bits per weight over all decomposed layers; 0 without any."""
    weights = _count_weights(streams)
    return 8 * stored_bytes(streams) / weights if weights else 0.0


def density(streams: Mapping[str, LayerStreams]) -> float:
    """Share of the decomposed weights that the ortho streams hold; 0 without any."""
    weights = _count_weights(streams)
    return sum(layer.nnz for layer in streams.values()) / weights if weights else 0.0


def _count_weights(streams: Mapping[str, LayerStreams]) -> int:
    return sum(layer.n_weights for layer in streams.values())
