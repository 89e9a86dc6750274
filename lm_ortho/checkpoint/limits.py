"""Limits of what a checkpoint may hold. They lie far above any model, and are checked before a file is read or a model
is built, so that a small file cannot fill the memory or take hours."""

from __future__ import annotations

JSON_BYTES = 64 * 2**20
"""Bytes of ``config.json``, ``manifest.json`` or the index."""
JSON_DEPTH = 64
"""Lists and objects inside each other in a JSON file."""
WEIGHT_FILE_BYTES = 2**40
"""Bytes of all safetensors files of a manifest."""
OTHER_FILE_BYTES = 2**30
"""Bytes of all other files of a manifest, such as a tokenizer."""
FILES = 10_000
"""Files of a manifest."""
MODULES = 1_000_000
"""Decomposed layers."""
MEMORIES = 1_000
NAME_LENGTH = 512
"""Characters of the name of a module or a file."""
LAYERS = 1_000
"""Layers in ``config.json``: any whole number whose name ends with `layers` or `layer`."""
EXPERTS = 2**17
"""Experts in ``config.json``: any whole number whose name ends with `experts`."""
SIZE = 2**28
"""Any other size in ``config.json``: names that end with `size`, `dim`, `positions`, `embeddings`, `heads`, ..."""
