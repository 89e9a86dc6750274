"""Decomposed models on disk: a Hugging Face directory with the ortho stream in a separate file.

This package imports transformers only inside functions, because the start-up hook imports it while transformers
itself is being imported.
"""

from lm_ortho.checkpoint.attachment import attach
from lm_ortho.checkpoint.manifest import ORTHO_FILE, read_meta
from lm_ortho.checkpoint.read import is_checkpoint, list_memories, load
from lm_ortho.checkpoint.settings import FORMAT_VERSION
from lm_ortho.checkpoint.write import save

__all__ = ["FORMAT_VERSION", "ORTHO_FILE", "attach", "is_checkpoint", "list_memories", "load", "read_meta", "save"]
