#!/usr/bin/env python
"""How long the group ``unlearning`` takes at alpha=0, beside lm-eval's own ``hf`` on the same weights and requests.

    python benchmarks/evaluation.py --out benchmarks/results/2026-11-22-evaluation.json

The embedded model is exported at alpha=0 as a plain checkpoint for ``hf``; both models then run the same requests with
the same batch size in turns, after one turn that does not count. Time is that of ``simple_evaluate``: building
requests, the model, the metrics. Processor time is given too, for machines that are shared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_ortho import world
from lm_ortho.checkpoint.export import export
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.markdown import versions, write_text
from lm_ortho.plugin.bridges import tasks_dir


def turn(lm: Any, tasks: list[str], limit: int | None) -> tuple[float, float]:
    """(seconds, seconds of processor time) of one evaluation."""
    manager = TaskManager(
        include_defaults=False, include_path=str(tasks_dir()), metadata={"tokenizer": lm.tokenizer, "max_length": 256}
    )
    wall, busy = time.perf_counter(), time.process_time()
    lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    """Measures in turns and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the figures, JSON")
    parser.add_argument("--tasks", default="unlearning")
    parser.add_argument("--limit", type=int, help="documents of each task; all without it")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="batch size")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        export(world.path("decomposed"), plain, alpha=0.0)
        options = {"dtype": given.dtype, "device": "cpu", "batch_size": given.rows}
        made: dict[str, Callable[[], Any]] = {
            "hf": lambda: HFLM(pretrained=str(plain), **options),
            "libortho": lambda: LibOrthoLM(alpha=0.0, **options),
        }
        models = {name: make() for name, make in made.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for number in range(given.turns + 1):
            for name, lm in models.items():
                seconds = turn(lm, given.tasks.split(","), given.limit)
                print(f"turn {number}: {name} {seconds[0]:.1f} s, {seconds[1]:.1f} s of processor time", flush=True)
                if number:
                    times[name].append(seconds)
    medians = {name: [statistics.median(part) for part in zip(*each, strict=True)] for name, each in times.items()}
    ratios = {
        what: medians["libortho"][i] / medians["hf"][i] for i, what in enumerate(("seconds", "processor_seconds"))
    }
    figures = {
        "command": f"benchmarks/evaluation.py --tasks {given.tasks} --limit {given.limit} --rows {given.rows} "
        f"--dtype {given.dtype} --turns {given.turns}",
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "median_seconds": {
            name: dict(zip(("seconds", "processor_seconds"), m, strict=True)) for name, m in medians.items()
        },
        "libortho_over_hf": ratios,
    }
    write_text(given.out, json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures["libortho_over_hf"]))


if __name__ == "__main__":
    main()
