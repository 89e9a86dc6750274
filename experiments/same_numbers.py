#!/usr/bin/env python
"""The same weights through ``--model hf`` and ``--model libortho``, at several batch sizes, on every offline task.

    python experiments/same_numbers.py --out docs/results/2026-11-22-same-numbers.md

The embedded model with its memory merged is saved as a plain directory and measured as lm-eval's own ``hf``, and as
``libortho`` with ``bits=16,edit=none,alpha=1`` (nothing is rounded, nothing is edited). Every task takes part with
``--documents`` of its documents, evenly spread. In FP32 the numbers have to agree, whatever the batch size; the drift
of BF16 is what a batch size does to the same model in the precision that models are usually evaluated in.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from lm_ortho import world
from lm_ortho.data import write_rows
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.plugin.bridges import tasks_dir
from lm_ortho.world import people

FAMILIES = ("canary", "membership", "memorisation", "reasoning", "tofu_embedded", "user_sets", "world_text")
AGREE, BATCH_AGREES = 5e-5, 1e-4
"""Four digits; and what the batch size may do in FP32."""

Values = dict[tuple[str, str], float]


def task_names() -> list[str]:
    """Every task of ours that needs no network."""
    manager = TaskManager(include_defaults=False, include_path=str(tasks_dir()))
    files = [file.stem for family in FAMILIES for file in sorted((tasks_dir() / family).glob("*.yaml"))]
    return [name for name in files if name in manager.all_subtasks]


def prepare(folder: Path) -> dict[str, str]:
    """The merged model as a directory, and the embedded sets as files."""
    model: Any = merge_adapter(load_causal_lm(world.path("base")), world.path("memory"))
    model.save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(world.path("base")).save_pretrained(folder / "merged")
    for name, split in (("forget", "forget"), ("retain", "retain"), ("holdout", "unseen")):
        write_rows(folder / f"{name}.jsonl", people.rows(split))
    sets = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    return {"pretrained": str(folder / "merged"), **sets}


def measured(lm: Any, names: list[str], given: Mapping[str, str], documents: int) -> Values:
    """Every number of every task."""
    manager = TaskManager(include_defaults=False, include_path=str(tasks_dir()), metadata=dict(given))
    sizes = {name: len(manager.load([name])["tasks"][name].eval_docs) for name in names}
    samples = {name: spread(size, documents) for name, size in sizes.items()}
    result = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, samples=samples, bootstrap_iters=0)
    assert result is not None
    return {
        (task, key.removesuffix(",none")): value
        for task, found in result["results"].items()
        for key, value in found.items()
        if isinstance(value, float) and key.endswith(",none") and "_stderr" not in key
    }


def spread(size: int, wanted: int) -> list[int]:
    """Numbers of documents, evenly spread over all."""
    return sorted({round(i * (size - 1) / max(1, wanted - 1)) for i in range(min(wanted, size))})


def difference(one: float, other: float) -> float:
    """Relative above 1, absolute below: how many digits agree."""
    return abs(one - other) / max(1.0, abs(one), abs(other))


def page(found: Mapping[str, Values], documents: int) -> tuple[str, bool]:
    """The page, and whether everything agrees."""
    lines, fine = [], True
    pairs = {
        "libortho - hf": ("hf, float32, batch 16", "libortho, float32, batch 16", AGREE),
        "batch 1 - 16": ("hf, float32, batch 16", "hf, float32, batch 1", BATCH_AGREES),
        "batch 4 - 16": ("hf, float32, batch 16", "hf, float32, batch 4", BATCH_AGREES),
        "bfloat16, batch 1 - 16": ("hf, bfloat16, batch 16", "hf, bfloat16, batch 1", None),
    }
    first = found["hf, float32, batch 16"]
    for key, value in first.items():
        if key[1].endswith(("_low", "_high")):
            continue
        cells = []
        for one, other, bar in pairs.values():
            apart = difference(found[one][key], found[other][key])
            fine = fine and (bar is None or apart <= bar)
            cells.append(f"{apart:.1e}" if apart else "0")
        lines.append([*key, f"{value:.4f}", *cells])
    head = (
        f"# The same numbers through every door\n\n{versions()}, {torch.get_num_threads()} thread; "
        f"`python experiments/same_numbers.py --documents {documents}`: up to {documents} documents of each task. "
        f"Differences are relative above 1 and absolute below. {'All agree' if fine else 'NOT all agree'}: FP32 within "
        f"{AGREE:g} between the models and {BATCH_AGREES:g} between batch sizes; the last column is the drift of "
        "BF16.\n\n"
    )
    table = markdown_table(["task", "metric", "hf, float32, batch 16", *pairs], lines)
    return f"{head}{table}\n", fine


def main() -> None:
    """Measures, writes the page, and fails where FP32 does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the page, Markdown")
    parser.add_argument("--documents", type=int, default=40, help="of each task")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names, found = task_names(), dict[str, Values]()
    with tempfile.TemporaryDirectory() as temporary:
        data = prepare(Path(temporary))
        for dtype, rows in (("float32", 16), ("float32", 1), ("float32", 4), ("bfloat16", 16), ("bfloat16", 1)):
            lm = HFLM(pretrained=data["pretrained"], dtype=dtype, device="cpu", batch_size=rows)
            found[f"hf, {dtype}, batch {rows}"] = measured(lm, names, data, given.documents)
        recipe: dict[str, Any] = {"bits": 16, "edit": "none", "alpha": 1.0, "dtype": "float32", "batch_size": 16}
        recipe |= {name: data[name] for name in ("pretrained", "forget", "retain")}
        ours = LibOrthoLM(device="cpu", **recipe)
        found["libortho, float32, batch 16"] = measured(ours, names, data, given.documents)
    text, fine = page(found, given.documents)
    write_text(given.out, text)
    print(text)
    if not fine:
        raise SystemExit("FP32 numbers differ")


if __name__ == "__main__":
    main()
