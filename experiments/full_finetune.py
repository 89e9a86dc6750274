#!/usr/bin/env python
"""Plants the memory of the embedded world by full fine-tuning instead of LoRA, and trains retain-only models likewise.

    python experiments/full_finetune.py --out full/
    lm-ortho verdict --weights full/

Written to ``--out``: ``base`` (a copy of the embedded one), ``memory``, ``never_saw`` and ``never_saw_2``, full models
in BF16. Text, rounds and repetitions are those of the embedded adapters. Finished models are not trained again, an
interrupted training resumes.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from lm_ortho import world
from lm_ortho.finetune import train_full
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.verdict import models
from lm_ortho.world import adapters

RATE = 0.2
"""Factor on the adapters' learning rates that suits all weights."""


def train_model(out: Path, name: str) -> None:
    """Trains one model through all rounds and saves it; a state file per round lets an interrupted run resume."""
    tokenizer = models.load_tokenizer(out)
    model = adapters.train_rounds(out / "base", tokenizer, name, out, ProgressBars(), fit=train_full, share=RATE)
    partial = out / f"{name}.partial"
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.replace(out / name)
    for state in adapters.list_state_files(out, name):
        state.unlink(missing_ok=True)


def main() -> None:
    """Trains the missing models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument(
        "--only", choices=models.MODEL_NAMES[1:], help="train only this model, to run several in parallel"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "base").is_dir():
        partial = arguments.out / "base.partial"
        shutil.copytree(world.get_path("base"), partial, dirs_exist_ok=True)
        partial.replace(arguments.out / "base")
    for name in [arguments.only] if arguments.only else models.MODEL_NAMES[1:]:
        if not (arguments.out / name).is_dir():
            train_model(arguments.out, name)
            print(f"{name}: trained")


if __name__ == "__main__":
    main()
