"""The buffers of a two-stream layer as streams: whatever sets them goes through the checks that streams make."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lm_ortho.errors import UserError
from lm_ortho.layer.operands import BASE_BUFFERS, StreamLayer, ortho_buffers, parse_memory_name
from lm_ortho.streams import DEFAULT_MEMORY, BaseStream, LayerStreams, OrthoStream


def list_memories(buffers: Mapping[str, Tensor | None]) -> tuple[str, ...]:
    """The memories whose values are among these buffers, the first memory first."""
    names = [parse_memory_name(name) for name, tensor in buffers.items() if tensor is not None]
    return tuple(sorted(filter(None, names), key=lambda name: name != DEFAULT_MEMORY))


def build_streams(layer: StreamLayer, buffers: Mapping[str, Tensor | None]) -> LayerStreams:
    """The streams that ``layer`` holds with these buffers.

    Raises:
        ValueError: for a tensor that is missing, of another form or dtype, or with a wrong value or index, and for two
            memories that hold the same position.
    """
    shape = (layer.out_features, layer.in_features)
    base_tensors = {name: buffers[name] for name in BASE_BUFFERS if name in buffers}
    base = BaseStream(shape, layer.bits, layer.group_size, **base_tensors)
    memories = {}
    for memory in list_memories(buffers):
        parts = {name: buffers.get(name) for name in ortho_buffers(memory)}
        rowptr, cols, vals = parts.values()
        if rowptr is None or cols is None or vals is None:
            absent_names = [name for name, part in parts.items() if part is None]
            raise ValueError(f"memory {memory!r} lacks {' and '.join(absent_names)}")
        memories[memory] = OrthoStream(rowptr, cols, vals, shape)
    return LayerStreams(base, memories.pop(DEFAULT_MEMORY, None), buffers.get("bias"), memories)


def select_incoming(layer: StreamLayer, state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict that belong to ``layer``, by the name of the buffer, those of new memories included.

    Raises:
        UserError: if the layer would not hold sound streams with them; nothing is changed then.
    """
    entries = {
        key.removeprefix(prefix): tensor
        for key, tensor in state_dict.items()
        if key.startswith(prefix) and isinstance(tensor, Tensor)
    }
    ortho_names = [name for memory in list_memories(entries) for name in ortho_buffers(memory)]
    incoming = {name: entries[name] for name in (*layer._buffers, *ortho_names) if name in entries}
    buffers = {**layer._buffers, **incoming}
    # A tensor without data can neither be checked nor be computed with.
    if incoming and not any(tensor is not None and tensor.is_meta for tensor in buffers.values()):
        device = next(iter(incoming.values())).device
        try:
            build_streams(layer, {name: None if t is None else t.to(device) for name, t in buffers.items()})
        except ValueError as error:
            raise UserError(f"load_state_dict: layer {prefix.removesuffix('.')!r}: {error}") from None
    return incoming
