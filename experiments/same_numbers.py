#!/usr/bin/env python
"""Evaluates the same weights with ``--model hf`` and ``--model libortho`` at several batch sizes on all offline tasks.

    python experiments/same_numbers.py --out docs/results/2026-11-22-same-numbers.md

The embedded model with its memory merged is saved as a plain directory and measured as lm-eval's own ``hf``, and as
``libortho`` with ``bits=16,edit=none,alpha=1`` (no rounding, no edit). Each task is evaluated on ``--documents`` of its
documents, evenly spread. In FP32 the numbers have to agree at every batch size; the drift of BF16 is the effect of the
batch size in the precision in which models are usually evaluated.
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
from lm_ortho.plugin.bridges import find_tasks_dir
from lm_ortho.world import people

FAMILIES = ("canary", "membership", "memorisation", "reasoning", "tofu_embedded", "user_sets", "world_text")
AGREE, BATCH_AGREES = 5e-5, 1e-4
"""Largest difference in FP32: four digits between the models; and between batch sizes."""

Values = dict[tuple[str, str], float]


def list_tasks() -> list[str]:
    """Lists our tasks that need no network."""
    manager = TaskManager(include_defaults=False, include_path=str(find_tasks_dir()))
    files = [file.stem for family in FAMILIES for file in sorted((find_tasks_dir() / family).glob("*.yaml"))]
    return [name for name in files if name in manager.all_subtasks]


def prepare(folder: Path) -> dict[str, str]:
    """Saves the merged model as a directory and the embedded sets as files; returns their paths."""
    model: Any = merge_adapter(load_causal_lm(world.get_path("base")), world.get_path("memory"))
    model.save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(world.get_path("base")).save_pretrained(folder / "merged")
    for name, split in (("forget", "forget"), ("retain", "retain"), ("holdout", "unseen")):
        write_rows(folder / f"{name}.jsonl", people.make_rows(split))
    sets = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    return {"pretrained": str(folder / "merged"), **sets}


def evaluate(lm: Any, names: list[str], metadata: Mapping[str, str], documents: int) -> Values:
    """Returns every number of every task."""
    manager = TaskManager(include_defaults=False, include_path=str(find_tasks_dir()), metadata=dict(metadata))
    sizes = {name: len(manager.load([name])["tasks"][name].eval_docs) for name in names}
    samples = {name: select_documents(size, documents) for name, size in sizes.items()}
    result = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, samples=samples, bootstrap_iters=0)
    assert result is not None
    return {
        (task, key.removesuffix(",none")): value
        for task, scores in result["results"].items()
        for key, value in scores.items()
        if isinstance(value, float) and key.endswith(",none") and "_stderr" not in key
    }


def select_documents(size: int, count: int) -> list[int]:
    """Returns the numbers of ``count`` documents, evenly spread over all ``size``."""
    return sorted({round(i * (size - 1) / max(1, count - 1)) for i in range(min(count, size))})


def compute_difference(a: float, b: float) -> float:
    """Returns the difference of two numbers, relative above 1 and absolute below."""
    return abs(a - b) / max(1.0, abs(a), abs(b))


def make_page(results: Mapping[str, Values], documents: int) -> tuple[str, bool]:
    """Makes the page, and returns whether all numbers agree."""
    lines, all_agree = [], True
    pairs = {
        "libortho - hf": ("hf, float32, batch 16", "libortho, float32, batch 16", AGREE),
        "batch 1 - 16": ("hf, float32, batch 16", "hf, float32, batch 1", BATCH_AGREES),
        "batch 4 - 16": ("hf, float32, batch 16", "hf, float32, batch 4", BATCH_AGREES),
        "bfloat16, batch 1 - 16": ("hf, bfloat16, batch 16", "hf, bfloat16, batch 1", None),
    }
    first = results["hf, float32, batch 16"]
    for key, value in first.items():
        if key[1].endswith(("_low", "_high")):
            continue
        cells = []
        for first_name, second_name, tolerance in pairs.values():
            difference = compute_difference(results[first_name][key], results[second_name][key])
            all_agree = all_agree and (tolerance is None or difference <= tolerance)
            cells.append(f"{difference:.1e}" if difference else "0")
        lines.append([*key, f"{value:.4f}", *cells])
    head = (
        f"# The same numbers with every model class\n\n{versions()}, {torch.get_num_threads()} thread; "
        f"`python experiments/same_numbers.py --documents {documents}`: up to {documents} documents of each task. "
        f"Differences are relative above 1 and absolute below. {'All agree' if all_agree else 'NOT all agree'}: FP32 "
        f"within {AGREE:g} between the models and {BATCH_AGREES:g} between batch sizes; the last column is the drift "
        "of BF16.\n\n"
    )
    table = markdown_table(["task", "metric", "hf, float32, batch 16", *pairs], lines)
    return f"{head}{table}\n", all_agree


def main() -> None:
    """Evaluates all variants, writes the page, and fails if FP32 numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the page, Markdown")
    parser.add_argument("--documents", type=int, default=40, help="number of documents per task")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, results = list_tasks(), dict[str, Values]()
    with tempfile.TemporaryDirectory() as temporary:
        data = prepare(Path(temporary))
        for dtype, rows in (("float32", 16), ("float32", 1), ("float32", 4), ("bfloat16", 16), ("bfloat16", 1)):
            lm = HFLM(pretrained=data["pretrained"], dtype=dtype, device="cpu", batch_size=rows)
            results[f"hf, {dtype}, batch {rows}"] = evaluate(lm, names, data, arguments.documents)
        recipe: dict[str, Any] = {"bits": 16, "edit": "none", "alpha": 1.0, "dtype": "float32", "batch_size": 16}
        recipe |= {name: data[name] for name in ("pretrained", "forget", "retain")}
        ortho_lm = LibOrthoLM(device="cpu", **recipe)
        results["libortho, float32, batch 16"] = evaluate(ortho_lm, names, data, arguments.documents)
    text, all_agree = make_page(results, arguments.documents)
    write_text(arguments.out, text)
    print(text)
    if not all_agree:
        raise SystemExit("FP32 numbers differ")


if __name__ == "__main__":
    main()
