#!/usr/bin/env python
"""Times an evaluation through ``libortho`` beside lm-eval's own ``hf`` on the same weights and requests.

    python benchmarks/evaluation.py --out benchmarks/results/DATE-evaluation.json
    python benchmarks/evaluation.py --pretrained DIR --rows 8 --out benchmarks/results/DATE-evaluation-own.json

Without ``--pretrained`` the embedded model is exported at alpha=0 as a plain checkpoint for ``hf``, and both models run
``--tasks`` from the building of requests to the metrics. With it the linear layers of a model of yours become random
ones of 4 bits with values on 1 % of the weights (time does not depend on what they are), and both models run requests
like those of TOFU for each alpha: log-likelihoods of a right and five wrong answers to each question, and greedy
completions of 32 tokens. Both run with the same batch size, alternately, after one warm-up each, in one thread.
Processor time is reported beside the time, for machines that are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_ortho import checkpoint, world
from lm_ortho.bench.problem import Problem, Shape
from lm_ortho.checkpoint.export import export
from lm_ortho.dial import format_alpha
from lm_ortho.finetune import load_causal_lm, load_tokenizer
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.layer import find_linear, patch
from lm_ortho.markdown import versions, write_text
from lm_ortho.plugin.bridges import find_tasks_dir
from lm_ortho.streams import LayerStreams
from lm_ortho.world import people

Models = dict[str, Callable[[], Any]]
Seconds = tuple[float, float]
"""Seconds, and seconds of processor time."""


def measure_time(function: Callable[[], Any]) -> Seconds:
    """Returns the time and the processor time of one call."""
    wall_start, processor_start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall_start, time.process_time() - processor_start


def evaluate(lm: Any, tasks: list[str], limit: int | None) -> None:
    """Runs one evaluation of tasks of this package."""
    manager = TaskManager(
        include_defaults=False,
        include_path=str(find_tasks_dir()),
        metadata={"tokenizer": lm.tokenizer, "max_length": 256},
    )
    lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)


def make_requests(count: int) -> tuple[list[Instance], list[Instance]]:
    """Makes requests of ``count`` questions: log-likelihoods of answers, and greedy completions."""
    likelihoods, completions = list[Instance](), list[Instance]()
    for number, row in enumerate(people.make_rows("forget")[:count]):
        context = f"Question: {row.question}\nAnswer:"
        for answer in (row.answer, *row.perturbed_answer[:5]):
            likelihoods.append(Instance("loglikelihood", {}, (context, " " + answer), number))
        options = {"until": ["<never>"], "max_gen_toks": 32, "min_new_tokens": 32, "do_sample": False}
        completions.append(Instance("generate_until", {}, (context, options), number))
    return likelihoods, completions


def compare(models: Models, works: dict[str, Callable[[Any], Any]], turns: int) -> dict[str, Any]:
    """Measures each piece of work with each model, alternately; returns medians and ratios by the name of the work."""
    loaded_models = {name: make() for name, make in models.items()}
    figures = {}
    for work, function in works.items():
        times: dict[str, list[Seconds]] = {name: [] for name in loaded_models}
        for turn in range(turns + 1):
            for name, lm in loaded_models.items():
                seconds = measure_time(lambda function=function, lm=lm: function(lm))  # type: ignore[misc]
                print(f"{work} {turn}: {name} {seconds[0]:.1f} s, {seconds[1]:.1f} s of processor time", flush=True)
                if turn:
                    times[name].append(seconds)
        medians = {name: _medians(seconds) for name, seconds in times.items()}
        ratios = {figure: medians["libortho"][figure] / value for figure, value in medians["hf"].items()}
        figures[work] = {"median_seconds": medians, "libortho_over_hf": ratios}
        print(json.dumps({work: ratios}), flush=True)
    return figures


def _medians(times: Iterable[Seconds]) -> dict[str, float]:
    seconds = [statistics.median(part) for part in zip(*times, strict=True)]
    return dict(zip(("seconds", "processor_seconds"), seconds, strict=True))


def decompose_at_random(pretrained: str, directory: Path) -> None:
    """Writes a checkpoint of a model of this form, with random streams at a density of 1 %."""
    model = load_causal_lm(pretrained)
    problems = {name: Problem(Shape(*layer.weight.shape)) for name, layer in find_linear(model).items()}
    patch(model, {name: LayerStreams(problem.base, problem.make_ortho(0.01)) for name, problem in problems.items()})
    checkpoint.save(directory, model, load_tokenizer(pretrained), {})


def main() -> None:
    """Measures both models alternately and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the figures, JSON")
    parser.add_argument("--pretrained", help="directory of a plain model of yours, in place of the embedded one")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 1.0], help="with --pretrained")
    parser.add_argument("--questions", type=int, default=8, help="with --pretrained: number of questions")
    parser.add_argument("--tasks", default="unlearning", help="without --pretrained")
    parser.add_argument("--limit", type=int, help="number of documents per task; all by default")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16, help="batch size")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = {"dtype": arguments.dtype, "device": "cpu", "batch_size": arguments.rows}
    works: dict[str, Callable[[Any], Any]] = {
        "tasks": lambda lm: evaluate(lm, arguments.tasks.split(","), arguments.limit)
    }
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory, alphas = Path(world.get_path("decomposed")), [0.0]
        if arguments.pretrained:
            directory, alphas = Path(temporary) / "decomposed", arguments.alphas
            decompose_at_random(arguments.pretrained, directory)
            likelihoods, completions = make_requests(arguments.questions)
            works = {
                "log_likelihood": lambda lm: lm.loglikelihood(likelihoods, disable_tqdm=True),
                "generation": lambda lm: lm.generate_until(completions, disable_tqdm=True),
            }
        for alpha in alphas:
            plain = Path(temporary) / f"plain-{format_alpha(alpha)}"
            export(directory, plain, alpha=alpha)
            models: Models = {
                "hf": lambda plain=plain: HFLM(pretrained=str(plain), **options),  # type: ignore[misc]
                "libortho": lambda alpha=alpha: LibOrthoLM(str(directory), alpha=alpha, **options),  # type: ignore[misc]
            }
            figures[f"alpha={format_alpha(alpha)}"] = compare(models, works, arguments.turns)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "pretrained")}
    report = {
        "settings": settings,
        "model": os.path.basename(arguments.pretrained) if arguments.pretrained else "embedded",
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "figures": figures,
    }
    write_text(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
