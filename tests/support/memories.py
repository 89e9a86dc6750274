"""A small model with two memories."""

from __future__ import annotations

import torch

from lm_ortho.layer import patch
from lm_ortho.streams import LayerStreams, OrthoStream
from tests.support import tiny


def split_stream(streams, names=("a", "b")):
    """Distributes the ortho stream of a layer over several memories, position by position."""
    positions = streams.ortho.support().nonzero()
    dense = streams.ortho.to_dense()
    memories = {}
    for i, name in enumerate(names):
        mask = torch.zeros_like(dense, dtype=torch.bool)
        mask[tuple(positions[i :: len(names)].T)] = True
        memories[name] = OrthoStream.from_dense(dense, mask)
    return LayerStreams(streams.base, None, streams.bias, memories)


def two_memories(model=None):
    """A small patched model with memories ``a`` and ``b`` and its streams as one memory."""
    model = tiny.llama() if model is None else model
    whole = tiny.model_streams(model)
    patch(model, {name: split_stream(streams) for name, streams in whole.items()})
    return model, whole
