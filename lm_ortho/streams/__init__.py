"""The two streams of a layer: a low-bit dense base and a sparse rest, and what they cost in bits."""

from lm_ortho.streams.base_stream import BITS, BaseStream, code_range
from lm_ortho.streams.layer_streams import RESERVED, UNNAMED, LayerStreams, valid_memory_name
from lm_ortho.streams.ortho_stream import OrthoStream
from lm_ortho.streams.size import bits_per_weight, density, stored_bytes

__all__ = [
    "BITS",
    "RESERVED",
    "UNNAMED",
    "BaseStream",
    "LayerStreams",
    "OrthoStream",
    "bits_per_weight",
    "code_range",
    "density",
    "stored_bytes",
    "valid_memory_name",
]
