"""Reads tensors of safetensors files by name, after comparing their dtypes and shapes with those of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lm_ortho.errors import UserError, printable
from lm_ortho.layer import OrthoLinear, ortho_layers
from lm_ortho.streams import BaseStream, OrthoStream, validate_disjoint, validate_finite

ORTHO_PARTS = {"rowptr": "ortho_rowptr", "cols": "ortho_cols", "vals": "ortho_vals"}
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class StoredTensor(NamedTuple):
    """What the header of a file says about a tensor, and the open file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    handle: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles(AbstractContextManager["TensorFiles"]):
    """The tensors of some files of one directory, by name. The files are open until the end of the ``with`` block."""

    def __init__(self, directory: Path, files: Iterable[str]) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self._handles: list[Any] = []
        for file in files:
            self._open(file)

    def _open(self, file: str) -> None:
        with _describe_errors(self.directory, file):
            handle: Any = safe_open(self.directory / file, framework="pt")
            self._handles.append(handle.__enter__())
            for name in handle.keys():  # noqa: SIM118  (no mapping)
                if name in self.tensors:
                    raise UserError(
                        f"{self.directory}: {file} and {self.tensors[name].file} both hold {printable(name)}"
                    )
                part = handle.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UserError(
                        f"{self.directory}: {file}: {printable(name)} is {part.get_dtype()}, which is not used"
                    )
                self.tensors[name] = StoredTensor(file, dtype, tuple(part.get_shape()), handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.__exit__(kind, error, traceback)

    def read(self, name: str) -> Tensor:
        """One tensor. Raises ``UserError`` if there is none of this name."""
        stored = self.tensors.get(name)
        if stored is None:
            raise UserError(f"{self.directory}: the streams lack {name}")
        with _describe_errors(self.directory, stored.file):
            tensor: Tensor = stored.handle.get_tensor(name)
        return tensor


def check_base(model: nn.Module, files: TensorFiles) -> None:
    """Compares the files of the base stream with a model whose layers are replaced by empty ``OrthoLinear`` ones.

    Every tensor of the model is there, in its shape and dtype (another floating dtype outside the streams), no value
    is NaN or infinite, and there are no further tensors. Values are read, except codes, which have no invalid ones.

    Raises:
        UserError: names file and tensor.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    expected = {name: tensor for name, tensor in expected.items() if not _is_ortho(name)}
    exact = {f"{name}.{part}" for name, layer in ortho_layers(model).items() for part in _base_layout(layer)}
    tied_names = getattr(model, "all_tied_weights_keys", None) or {}
    for name, tensor in expected.items():
        stored = files.tensors.get(name)
        if stored is None:
            if name in tied_names:
                continue
            raise UserError(f"{files.directory}: the base stream lacks {name}")
        both_float = stored.dtype in _FLOATS and tensor.is_floating_point()
        fits = stored.dtype == tensor.dtype or (both_float and name not in exact)
        if not fits or stored.shape != tuple(tensor.shape):
            raise UserError(
                f"{files.directory}: {stored.file}: {name} must be {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"not {stored.dtype} of shape {stored.shape}"
            )
    for name, stored in files.tensors.items():
        if name not in expected and name not in tied_names:
            raise UserError(f"{files.directory}: {stored.file} holds {printable(name)}, which the model does not have")
        if stored.dtype in _FLOATS:
            with _describe_values(files.directory, stored.file):
                validate_finite(name, files.read(name))


def read_base(files: TensorFiles, name: str, layer: OrthoLinear) -> BaseStream:
    """The base stream of the layer ``name``. Raises ``UserError`` for tensors that do not fit."""
    tensors = {part: files.read(f"{name}.{part}") for part in _base_layout(layer)}
    with _describe_values(files.directory, f"streams of {name} do not fit"):
        return BaseStream(layer.shape, layer.bits, layer.group_size, **tensors)


def read_memories(files: Mapping[str, TensorFiles], name: str, layer: OrthoLinear) -> dict[str, OrthoStream]:
    """The ortho streams of the layer ``name`` by memory; ``files`` has the file of each memory.

    Raises:
        UserError: as ``read_base``, and for two memories that hold the same weight.
    """
    streams = {memory: _read_ortho(tensors, name, layer) for memory, tensors in files.items()}
    if len(streams) > 1:
        parts = {memory: {"rowptr": ortho.rowptr, "cols": ortho.cols} for memory, ortho in streams.items()}
        with _describe_values(next(iter(files.values())).directory, f"streams of {name} do not fit"):
            validate_disjoint(layer.shape, parts)
    return streams


def _read_ortho(files: TensorFiles, name: str, layer: OrthoLinear) -> OrthoStream:
    parts = {field: files.read(f"{name}.{part}") for field, part in ORTHO_PARTS.items()}
    file = files.tensors[f"{name}.{ORTHO_PARTS['rowptr']}"].file
    with _describe_values(files.directory, f"{file} does not fit the base: {name}"):
        return OrthoStream(**parts, shape=layer.shape)


def _base_layout(layer: OrthoLinear) -> Iterable[str]:
    return BaseStream.layout(layer.shape, layer.bits, layer.group_size)


def _is_ortho(name: str) -> bool:
    return name.rpartition(".")[2].startswith("ortho_")


@contextmanager
def _describe_errors(directory: Path, file: str) -> Iterator[None]:
    """Turns errors of the safetensors library into a ``UserError`` that names the file."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{directory}: {file} cannot be read: truncated or not a safetensors file ({printable(error)})"
        ) from None


@contextmanager
def _describe_values(directory: Path, subject: str) -> Iterator[None]:
    """Turns the error of a check into a ``UserError`` that names the directory and the subject."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{directory}: {subject}: {error}") from None
