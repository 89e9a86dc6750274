#!/usr/bin/env python
"""Plants the memory of the embedded world by full fine-tuning instead of LoRA, and makes its own references.

    python experiments/full_finetune.py --out full/
    lm-ortho verdict --weights full/

Written to ``--out``: ``base`` (a copy of the embedded one), ``memory``, ``never_saw`` and ``never_saw_2``, whole models
in BF16. Text, rounds and repetitions are those of the embedded adapters; finished models are kept, an interrupted one
goes on where it stopped.
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
"""Share of the adapters' learning rates that suits all weights."""


def make(out: Path, name: str) -> None:
    """One model through all rounds; a state file per round keeps it."""
    words = models.load_words(out)
    model = adapters.through_rounds(out / "base", words, name, out, ProgressBars(), train_full, RATE)
    partial = out / f"{name}.partial"
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.replace(out / name)
    for state in adapters.state_files(out, name):
        state.unlink(missing_ok=True)


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=models.NAMES[1:], help="this model alone, to train several side by side")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "base").is_dir():
        partial = given.out / "base.partial"
        shutil.copytree(world.path("base"), partial, dirs_exist_ok=True)
        partial.replace(given.out / "base")
    for name in [given.only] if given.only else models.NAMES[1:]:
        if not (given.out / name).is_dir():
            make(given.out, name)
            print(f"{name}: made")


if __name__ == "__main__":
    main()
