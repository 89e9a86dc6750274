"""The two streams of a layer, a low-bit dense base stream and a sparse ortho stream, and their size in bits."""

from lm_ortho.streams.base_stream import BITS, BaseStream, code_range
from lm_ortho.streams.layer_streams import DEFAULT_MEMORY, RESERVED_NAMES, LayerStreams, is_valid_memory_name
from lm_ortho.streams.ortho_stream import OrthoStream
from lm_ortho.streams.size import bits_per_weight, density, stored_bytes

__all__ = [
    "BITS",
    "DEFAULT_MEMORY",
    "RESERVED_NAMES",
    "BaseStream",
    "LayerStreams",
    "OrthoStream",
    "bits_per_weight",
    "code_range",
    "density",
    "is_valid_memory_name",
    "stored_bytes",
]
