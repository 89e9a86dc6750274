#!/usr/bin/env python
"""Measures one step of the edit: the gradients of all weights beside those of the support alone.

    python benchmarks/step.py --shape embedded     # the shape of the embedded model, seconds
    python benchmarks/step.py --shape smollm2      # that of SmolLM2-135M, minutes

Weights and rows are random, and the support is drawn at random. Each kind of gradient is measured in a process of its
own: the CPU time of a step, the largest resident memory during the steps, and what the process held before them. The
results go to ``benchmarks/results/`` as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lm_ortho.data.encoding import ANSWER, CONTEXT, Example
from lm_ortho.data.logits import selected_logits
from lm_ortho.layer import find_linear
from lm_ortho.markdown import versions
from lm_ortho.objective import GENTLE, LossWeights, Objective
from lm_ortho.objective.distribution import stack
from lm_ortho.runtime.precision import gradient_checkpointing, select_attention

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512},
    "embedded": {
        "hidden_size": 320,
        "intermediate_size": 960,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "vocab_size": 2889,
        "tie_word_embeddings": True,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
ROWS = {"tiny": (4, 8, 12), "embedded": (48, 96, 25), "smollm2": (24, 48, 80)}
"""Forget rows and retain rows of a step, and tokens of a row, of which a third (embedded) or half are the answer."""
KINDS = ("all", "support")


def make_objective(shape: str, share: float = 1.0) -> Objective:
    """An objective of random weights and of a ``share`` of the rows, which are random, too."""
    torch.manual_seed(0)
    vocabulary = SHAPES[shape]["vocab_size"]
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8} | SHAPES[shape]
    model = LlamaForCausalLM(LlamaConfig(**heads)).eval().requires_grad_(False)
    layers = find_linear(model)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    forget, retain, tokens = (*(max(1, round(share * rows)) for rows in ROWS[shape][:2]), ROWS[shape][2])
    answer = tokens // 3 if shape == "embedded" else tokens // 2
    roles = (CONTEXT,) * (tokens - answer) + (ANSWER,) * answer
    examples = [Example(tuple(torch.randint(2, vocabulary, (tokens,)).tolist()), roles) for _ in range(forget + retain)]
    probs = [torch.randn(answer, vocabulary).softmax(-1) for _ in range(forget)]
    return Objective(
        model,
        layers,
        stack(examples[:forget], probs),
        forget=examples[:forget],
        retain=examples[forget:],
        penalty=GENTLE,
        weights=LossWeights(forget_rows=forget),
        seed=0,
    )


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Yields the resident bytes before, and after the context also the largest during it."""
    process, is_running = psutil.Process(), threading.Event()
    resident = process.memory_info().rss
    memory = {"before": resident, "peak": resident}

    def sample() -> None:
        while not is_running.wait(0.02):
            memory["peak"] = max(memory["peak"], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        is_running.set()
        thread.join()


def measure(
    shape: str, kind: str, *, density: float, steps: int, recompute: bool, threads: int, share: float = 1.0
) -> dict[str, float]:
    """CPU and wall seconds of a step and the peak memory in gigabytes.

    The times are the mean over ``steps``, of more than one step after another that is not counted.
    """
    torch.set_num_threads(threads)
    with ExitStack() as stack_of_contexts:
        objective = make_objective(shape, share)
        model = objective.model
        for context in (selected_logits(model), select_attention(model, ROWS[shape][2])):
            stack_of_contexts.enter_context(context)
        if recompute:
            stack_of_contexts.enter_context(gradient_checkpointing(model))
        if kind == "support":
            masks = {name: torch.rand(layer.weight.numel()) < density for name, layer in objective.layers.items()}
            positions = {name: mask.nonzero()[:, 0] for name, mask in masks.items()}
            stack_of_contexts.enter_context(objective.restrict_to_support(positions))
        with peak_memory() as memory:
            if steps > 1:
                objective.gradients()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(steps):
                objective.gradients()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    result = {"cpu_seconds": cpu / steps, "seconds": wall / steps}
    result |= {f"{name}_gb": size / 1e9 for name, size in memory.items()}
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    """Measures both kinds of gradients and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="embedded")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the rows of a step; the time is linear in it"
    )
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("density", "steps", "recompute", "threads", "share")}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        results = {kind: pool.submit(measure, arguments.shape, kind, **settings).result() for kind in KINDS}
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, with other load",
        "shape": arguments.shape,
        "rows": dict(zip(("forget", "retain", "tokens"), ROWS[arguments.shape], strict=True)),
        **settings,
        "gradients": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{report['date']}-step-{arguments.shape}{'-recompute' if arguments.recompute else ''}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
