"""Saves the result of a method as a Hugging Face directory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from lm_ortho import checkpoint
from lm_ortho.baselines.interface import Result
from lm_ortho.checkpoint.write import write_json
from lm_ortho.files import atomic_directory

REPORT_FILE = "method.json"


def save(result: Result, directory: Path, tokenizer: Any, metadata: dict[str, Any] | None = None) -> Path:
    """Writes model, tokenizer and the report of the method (``method.json``) into a new ``directory``, atomically.

    A decomposed model is saved as a checkpoint of this package (``checkpoint.is_checkpoint``), any other model as a
    plain one in BF16, which represents its values exactly. ``metadata`` is JSON that is stored beside the report, such
    as name, settings and seed of the method.

    Raises:
        UserError: where ``directory`` is occupied or cannot be written.
    """
    with atomic_directory(directory, "directory") as scratch:
        if result.is_decomposed:
            checkpoint.save(scratch, result.model, tokenizer, dict(result.meta))
        else:
            model: Any = copy.deepcopy(result.model).to(torch.bfloat16)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        write_json(scratch / REPORT_FILE, {**(metadata or {}), "report": dict(result.report)})
    return directory
