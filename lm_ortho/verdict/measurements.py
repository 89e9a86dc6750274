"""Measures a model on our lm-eval tasks, as numbers and as paired samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_ortho.metrics import Interval
from lm_ortho.plugin.bridges import find_tasks_dir

MEMORY_TASKS = (
    "tofu_forget",
    "tofu_forget_paraphrased",
    "tofu_unseen",
    "canary_extraction",
    "canary_unplanted",
    "tofu_retain",
    "world_text",
)
REASONING_TASKS = ("reasoning_arithmetic", "reasoning_comparison", "reasoning_relations", "reasoning_facts")
REASONING_METRICS = ("acc", "exact_match")


@dataclass
class Measurement:
    """``values[task][metric]`` with its 95 % interval, and the results per document, in order.

    ``samples[task][metric]`` is one number per document: 0 or 1 for a rate, the mean loss in nats per token for a
    perplexity, log R for the truth ratio. A metric that some documents do not have has no samples (canaries have no
    truth ratio). ``groups[task]`` is the author or canary that each document belongs to.
    """

    values: dict[str, dict[str, Interval]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def value(self, task: str, metric: str) -> Interval:
        """The value of a metric with its interval."""
        return self.values[task][metric]

    def to_json(self) -> dict[str, Any]:
        values = {task: {m: list(i) for m, i in metrics.items()} for task, metrics in self.values.items()}
        return {"values": values, "samples": self.samples, "groups": self.groups, "seconds": self.seconds}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        values = {task: {m: Interval(*i) for m, i in metrics.items()} for task, metrics in data["values"].items()}
        return cls(values, data["samples"], data["groups"], data["seconds"])


def measure(lm: Any, tokenizer: Any, tasks: tuple[str, ...], limit: int | None = None, **metadata: Any) -> Measurement:
    """Runs the tasks on an lm-eval model, with the first ``limit`` documents of each.

    ``metadata`` reaches the tasks as ``--metadata`` does, for instance ``forget`` and ``retain`` with your own sets.
    The values are those of ``lm_eval --tasks``: the verdict has no metric code of its own.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    start_time = time.perf_counter()
    metadata = {"tokenizer": tokenizer, **metadata}
    manager = TaskManager(include_path=[str(find_tasks_dir())], include_defaults=False, metadata=metadata)
    results = simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
    )
    measurement = Measurement()
    for task in tasks:
        # 1. Values: the metrics that come with an interval.
        scores = results["results"][task]
        names = [key.removesuffix(",none") for key in scores if key.endswith(",none")]
        measurement.values[task] = {
            name: Interval(*(float(scores[f"{name}{end},none"]) for end in ("", "_low", "_high")))
            for name in names
            if f"{name}_low" in names
        }
        # 2. Samples: the metrics that every document has.
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        metrics = [name for name in measurement.values[task] if all(name in sample for sample in samples)]
        measurement.samples[task] = {name: [_to_number(sample[name]) for sample in samples] for name in metrics}
        measurement.groups[task] = [str(sample[metrics[0]][-1]) for sample in samples]
    measurement.seconds = round(time.perf_counter() - start_time, 1)
    return measurement


def _to_number(value: Sequence[Any]) -> float:
    """Returns the number of ``(number, group)``, or the mean of ``(sum, tokens, group)``."""
    return float(value[0]) if len(value) == 2 else float(value[0]) / float(value[1])
