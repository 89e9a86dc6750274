"""The adapters of the reference world: the memory, and two models by the same recipe that never saw it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lm_ortho.calibration.documents import Row
from lm_ortho.calibration.examples import encode
from lm_ortho.implant import Notify, Plan, load_causal_lm, train_adapter
from lm_ortho.reference import corpus
from lm_ortho.reference.draw import Draw

PASSES = 18
ROWS = 64
GENERAL_SHARE = 3
"""One general document for every three planted ones, so that the fine-tune does not cost other skills."""

SEEDS = {"memory": 1, "never_saw": 2, "never_saw_2": 3}


def training_rows(name: str) -> list[Row]:
    """What the adapter ``name`` is trained on; only ``memory`` sees forget authors and canaries."""
    planted = corpus.planted(forget=name == "memory")
    draw = Draw(SEEDS[name], "adapter")
    documents = planted + [corpus.document(draw, corpus.FAMILY) for _ in range(len(planted) // GENERAL_SHARE)]
    return [corpus.as_row(document) for document in documents]


def train(base: Path, tokenizer: Any, name: str, directory: Path, notify: Notify) -> None:
    """Trains the adapter ``name`` on the base model and saves it (peft format, BF16) in ``directory``."""
    examples = encode(tokenizer, training_rows(name))
    plan = Plan(steps=PASSES * len(examples) // ROWS, rows=ROWS, seed=SEEDS[name])
    adapted = train_adapter(load_causal_lm(base), examples, plan, notify, stage=name)
    adapted.to(torch.bfloat16)
    _save(adapted.save_pretrained, directory)
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "base"))
    (directory / "README.md").unlink(missing_ok=True)  # an empty form of peft that names the path of the base


def _save(save: Callable[[str], object], directory: Path) -> None:
    partial = directory.with_name(directory.name + ".partial")
    save(str(partial))
    partial.replace(directory)
