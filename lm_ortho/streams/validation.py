"""The one validator of stored tensors: nothing of a file reaches arithmetic or C++ before it was checked here.

``validate_layer`` checks all tensors of a layer at once; the classes of this room call the single checks, so that an
invalid stream cannot exist. Checks of indices are in ``kernels/checks.py``, because the kernels repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_ortho.kernels import MAX_FEATURES, check_csr, check_tensor, packed_width

BITS = (3, 4, 8, 16)
MAX_GROUP_SIZE = 2**16
"""The largest group_size. A row is padded to whole groups, so a larger one would only cost memory."""
ORTHO_PARTS = ("rowptr", "cols", "vals")


def validate_layer(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    base: Mapping[str, Tensor | None],
    *,
    memories: Mapping[str, Mapping[str, Tensor | None]] | None = None,
    bias: Tensor | None = None,
) -> None:
    """Checks all tensors of one layer, as read from a file or a state dict.

    Args:
        shape: (out_features, in_features).
        bits: 3, 4, 8 or 16.
        group_size: weights per scale.
        base: ``qweight`` and ``scales``, or ``weight`` at 16 bits.
        memories: ``rowptr``, ``cols`` and ``vals`` by the name of the memory.
        bias: (out_features,), any floating dtype.

    Raises:
        ValueError: names the first tensor that is missing, has another dtype, shape or layout, holds a value that is
            not finite or an index that is out of range, and two memories that hold the same position.
    """
    validate_base(shape, bits, group_size, base)
    for name, parts in (memories or {}).items():
        for part in ORTHO_PARTS:
            if parts.get(part) is None:
                raise ValueError(f"{part} of {name} is missing")
        validate_ortho(shape, **parts)  # type: ignore[arg-type]
    validate_disjoint(shape, memories or {})
    if bias is not None:
        validate_bias(bias, shape[0])


def validate_shape(shape: tuple[int, int]) -> None:
    """Raises ``ValueError`` unless both features are numbers from 1 to ``MAX_FEATURES``."""
    if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"shape {shape} has no weights")
    if max(shape) > MAX_FEATURES:
        raise ValueError(f"shape {shape} has more rows or columns than {MAX_FEATURES}")


def validate_lattice(bits: int, group_size: int) -> None:
    """Raises ``ValueError`` for bits and group sizes that no base stream has."""
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits={bits!r}: supported are {BITS}")
    if type(group_size) is not int or group_size < 8 or group_size % 8 or group_size > MAX_GROUP_SIZE:
        raise ValueError(f"group_size={group_size!r} must be a positive multiple of 8 up to {MAX_GROUP_SIZE}")


def base_layout(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """The stored tensors of a base stream of this shape and lattice: name -> (dtype, shape)."""
    out_features, in_features = shape
    if bits == 16:
        return {"weight": (torch.bfloat16, (out_features, in_features))}
    return {
        "qweight": (torch.uint8, (out_features, packed_width(in_features, bits, group_size))),
        "scales": (torch.bfloat16, (out_features, -(-in_features // group_size))),
    }


def validate_base(shape: tuple[int, int], bits: int, group_size: int, tensors: Mapping[str, Tensor | None]) -> None:
    """Checks the tensors of a base stream; see ``BaseStream``. Raises ``ValueError`` as ``validate_layer``."""
    validate_shape(shape)
    validate_lattice(bits, group_size)
    layout = base_layout(shape, bits, group_size)
    for name, tensor in tensors.items():
        if name not in layout and tensor is not None:
            raise ValueError(f"a base stream of {bits} bits has no {name}")
    devices = set()
    for name, (dtype, tensor_shape) in layout.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{name} is missing")
        check_tensor(name, tensor, (dtype,), tensor_shape)
        validate_finite(name, tensor)
        devices.add(tensor.device)
    if len(devices) > 1:
        raise ValueError("qweight and scales are on different devices")


def validate_ortho(shape: tuple[int, int], rowptr: Tensor, cols: Tensor, vals: Tensor) -> None:
    """Checks the tensors of an ortho stream; see ``OrthoStream``. Raises ``ValueError`` as ``validate_layer``."""
    validate_shape(shape)
    check_csr(rowptr, cols, vals, shape)
    validate_finite("vals", vals)


def validate_disjoint(shape: tuple[int, int], memories: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Raises ``ValueError`` if two memories, each checked before, hold the same weight."""
    if len(memories) < 2:
        return
    positions = [_positions(shape, parts) for parts in memories.values()]
    ordered, order = torch.sort(torch.cat(positions))
    same = (ordered[1:] == ordered[:-1]).nonzero()
    if not same.numel():
        return
    at = int(same[0])
    ends = torch.tensor([part.numel() for part in positions]).cumsum(0)
    first, second = sorted(int((ends <= int(order[index])).sum()) for index in (at, at + 1))
    names = list(memories)
    row, column = divmod(int(ordered[at]), shape[1])
    raise ValueError(
        f"two memories hold the same position: {names[first]} and {names[second]}, row {row}, column {column}"
    )


def validate_bias(bias: Tensor, out_features: int) -> None:
    """Raises ``ValueError`` unless ``bias`` is a finite floating vector of ``out_features`` numbers."""
    if not bias.is_floating_point() or tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias of shape {tuple(bias.shape)} and {bias.dtype} for {out_features} out_features")
    validate_finite("bias", bias.to(torch.bfloat16))  # as it is stored: a large float32 becomes infinite


def validate_finite(name: str, tensor: Tensor) -> None:
    """Raises ``ValueError`` if a floating tensor holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no data")
    values = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # isfinite does not know every dtype of one byte
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds a value that is not finite")


def _positions(shape: tuple[int, int], parts: Mapping[str, Tensor | None]) -> Tensor:
    """(nnz,) int64: the place of each value in the flattened matrix; below 2^62, so it cannot overflow."""
    rowptr, cols = parts["rowptr"], parts["cols"]
    assert rowptr is not None
    assert cols is not None
    return torch.repeat_interleave(rowptr.long().diff()) * shape[1] + cols
