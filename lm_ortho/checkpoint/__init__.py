"""Decomposed models on disk: a Hugging Face directory whose ortho stream is a file of its own.

Nothing here imports transformers before it is needed: the start-up hook imports this package while
transformers itself is being imported.
"""

from lm_ortho.checkpoint.manifest import FORMAT_VERSION, ORTHO_FILE, read_meta
from lm_ortho.checkpoint.read import is_checkpoint, load, memories
from lm_ortho.checkpoint.write import attach, save

__all__ = ["FORMAT_VERSION", "ORTHO_FILE", "attach", "is_checkpoint", "load", "memories", "read_meta", "save"]
