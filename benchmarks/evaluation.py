#!/usr/bin/env python
"""Times the group ``unlearning`` at alpha=0 beside lm-eval's own ``hf`` on the same weights and requests.

    python benchmarks/evaluation.py --out benchmarks/results/2026-11-22-evaluation.json

The embedded model is exported at alpha=0 as a plain checkpoint for ``hf``; both models then run the same requests with
the same batch size, alternately, after one warm-up each. The time is that of ``simple_evaluate``: building requests,
the model, the metrics. Processor time is reported too, for machines that are shared.
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
from lm_ortho.plugin.bridges import find_tasks_dir


def time_evaluation(lm: Any, tasks: list[str], limit: int | None) -> tuple[float, float]:
    """Returns (seconds, seconds of processor time) of one evaluation."""
    manager = TaskManager(
        include_defaults=False,
        include_path=str(find_tasks_dir()),
        metadata={"tokenizer": lm.tokenizer, "max_length": 256},
    )
    wall_start, processor_start = time.perf_counter(), time.process_time()
    lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return time.perf_counter() - wall_start, time.process_time() - processor_start


def main() -> None:
    """Measures both models alternately and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the figures, JSON")
    parser.add_argument("--tasks", default="unlearning")
    parser.add_argument("--limit", type=int, help="number of documents per task; all by default")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="batch size")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary) / "plain"
        export(world.get_path("decomposed"), plain, alpha=0.0)
        options = {"dtype": arguments.dtype, "device": "cpu", "batch_size": arguments.rows}
        constructors: dict[str, Callable[[], Any]] = {
            "hf": lambda: HFLM(pretrained=str(plain), **options),
            "libortho": lambda: LibOrthoLM(alpha=0.0, **options),
        }
        models = {name: make() for name, make in constructors.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for number in range(arguments.turns + 1):
            for name, lm in models.items():
                seconds = time_evaluation(lm, arguments.tasks.split(","), arguments.limit)
                print(f"turn {number}: {name} {seconds[0]:.1f} s, {seconds[1]:.1f} s of processor time", flush=True)
                if number:
                    times[name].append(seconds)
    medians = {
        name: [statistics.median(part) for part in zip(*seconds, strict=True)] for name, seconds in times.items()
    }
    ratios = {
        figure: medians["libortho"][i] / medians["hf"][i] for i, figure in enumerate(("seconds", "processor_seconds"))
    }
    figures = {
        "command": f"benchmarks/evaluation.py --tasks {arguments.tasks} --limit {arguments.limit} "
        f"--rows {arguments.rows} --dtype {arguments.dtype} --turns {arguments.turns}",
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "median_seconds": {
            name: dict(zip(("seconds", "processor_seconds"), m, strict=True)) for name, m in medians.items()
        },
        "libortho_over_hf": ratios,
    }
    write_text(arguments.out, json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures["libortho_over_hf"]))


if __name__ == "__main__":
    main()
