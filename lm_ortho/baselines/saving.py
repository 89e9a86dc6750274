"""The result of a method as a Hugging Face directory."""

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


def save(result: Result, directory: Path, tokenizer: Any, told: dict[str, Any] | None = None) -> Path:
    """``directory``, made as a whole or not at all, with the tokenizer and the report of the method in ``method.json``.

    A decomposed model becomes a checkpoint of ours (``checkpoint.is_checkpoint``), any other a plain model in BF16,
    which holds its values as they are. ``told`` is JSON that goes beside the report: the name, settings and seed, say.

    Raises:
        UserError: where ``directory`` is occupied or cannot be written.
    """
    with atomic_directory(directory, "directory") as scratch:
        if result.decomposed:
            checkpoint.save(scratch, result.model, tokenizer, dict(result.meta))
        else:
            model: Any = copy.deepcopy(result.model).to(torch.bfloat16)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        write_json(scratch / REPORT_FILE, {**(told or {}), "report": dict(result.report)})
    return directory
