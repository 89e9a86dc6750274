"""The two streams of a layer, a low-bit dense base stream and a sparse ortho stream, and their size in bits."""

from lm_ortho.streams.base_stream import BaseStream, code_range
from lm_ortho.streams.layer_streams import DEFAULT_MEMORY, RESERVED_NAMES, LayerStreams, is_valid_memory_name
from lm_ortho.streams.ortho_stream import OrthoStream
from lm_ortho.streams.size import bits_per_weight, density, stored_bytes
from lm_ortho.streams.validation import (
    BITS,
    MAX_GROUP_SIZE,
    validate_disjoint,
    validate_finite,
    validate_lattice,
    validate_layer,
)

__all__ = [
    "BITS",
    "DEFAULT_MEMORY",
    "MAX_GROUP_SIZE",
    "RESERVED_NAMES",
    "BaseStream",
    "LayerStreams",
    "OrthoStream",
    "bits_per_weight",
    "code_range",
    "density",
    "is_valid_memory_name",
    "stored_bytes",
    "validate_disjoint",
    "validate_finite",
    "validate_lattice",
    "validate_layer",
]
