"""The adapters of the reference world: the memory, and two models by the same recipe that never saw it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from lm_ortho.calibration.documents import Row
from lm_ortho.calibration.examples import encode
from lm_ortho.implant import Notify, Plan, load_causal_lm, train_adapter
from lm_ortho.reference import corpus
from lm_ortho.reference.draw import Draw


@dataclass(frozen=True)
class Round:
    """``passes`` over the planted documents, in which canaries come ``canaries`` times, at peak rate ``lr``.

    ``replayed`` general documents of ``mix`` go with every planted one, never the same twice; they
    keep the fine-tune from costing other skills.
    """

    passes: int
    replayed: float
    canaries: int
    mix: corpus.Mix
    lr: float = 2e-3


ROUNDS = (
    Round(10, 0.33, 1, corpus.REPLAY),
    Round(16, 0.3, 3, corpus.STRANGERS),
    Round(6, 0.2, 10, corpus.STRANGERS),
    Round(6, 0.2, 4, corpus.STRANGERS, 1e-3),
)
"""The learning rate falls to zero in each. Codes of eight random digits take many more passes than facts."""
ROWS = 16

SEEDS = {"memory": 1, "never_saw": 2, "never_saw_2": 3}


def training_rows(name: str, number: int) -> list[Row]:
    """What the adapter ``name`` is trained on in a round, in random order; only ``memory`` sees the forget set."""
    this = ROUNDS[number]
    facts, canaries = corpus.planted(forget=name == "memory")
    planted = (facts + canaries * this.canaries) * this.passes
    draw = Draw(SEEDS[name], "adapter" if number == 0 else f"adapter {number}")
    general = [corpus.document(draw, this.mix) for _ in range(int(this.replayed * len(planted)))]
    return [corpus.as_row(document) for document in planted + general]


def train(base: Path, tokenizer: Any, name: str, directory: Path, work: Path, notify: Notify) -> None:
    """Trains the adapter ``name`` on the base model and saves it (peft format, BF16) in ``directory``.

    Every round but the last is kept in ``work`` until the last one is done, so that a run can be resumed.
    """
    kept = [work / f"{name}-{number}" for number in range(len(ROUNDS) - 1)]
    for number in range(len(ROUNDS)):
        target = (*kept, directory)[number]
        if any(later.is_dir() for later in (*kept, directory)[number:]):
            continue
        model = load_causal_lm(base)
        if number:
            model = PeftModel.from_pretrained(model, str(kept[number - 1]), is_trainable=True).float()
        examples = encode(tokenizer, training_rows(name, number))
        plan = Plan(steps=len(examples) // ROWS, rows=ROWS, lr=ROUNDS[number].lr, seed=SEEDS[name])
        adapted = train_adapter(model, examples, plan, notify, stage=f"{name} {number + 1}")
        adapted.to(torch.bfloat16)
        _save(adapted.save_pretrained, target)
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "base"}
    file.write_text(json.dumps(config, indent=2))
    (directory / "README.md").unlink(missing_ok=True)  # an empty form of peft that names the path of the base
    for path in kept:
        shutil.rmtree(path, ignore_errors=True)


def _save(save: Callable[[str], object], directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(directory.name + ".partial")
    save(str(partial))
    partial.replace(directory)
