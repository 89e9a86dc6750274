"""One model through our lm-eval tasks, as numbers and as paired samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_ortho.metrics import Interval
from lm_ortho.plugin.bridges import tasks_dir

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
    """``values[task][metric]`` with its 95 % interval, and what the documents gave, in order.

    ``samples[task][metric]`` is one number per document: 0 or 1 for a rate, the mean loss in nats per token for a
    perplexity, log R for the truth ratio; there are none of a metric that some documents do not have (canaries have no
    truth ratio). ``groups[task]`` is the author or canary each document belongs to.
    """

    values: dict[str, dict[str, Interval]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def value(self, task: str, metric: str) -> Interval:
        return self.values[task][metric]

    def as_json(self) -> dict[str, Any]:
        values = {task: {m: list(i) for m, i in metrics.items()} for task, metrics in self.values.items()}
        return {"values": values, "samples": self.samples, "groups": self.groups, "seconds": self.seconds}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        values = {task: {m: Interval(*i) for m, i in metrics.items()} for task, metrics in data["values"].items()}
        return cls(values, data["samples"], data["groups"], data["seconds"])


def measure(lm: Any, tokenizer: Any, tasks: tuple[str, ...], limit: int | None = None, **metadata: Any) -> Measurement:
    """Runs the tasks on an lm-eval model; ``limit`` takes the first documents of each.

    ``metadata`` reaches the tasks as ``--metadata`` does (``forget`` and ``retain`` of one's own, say).

    Exactly what ``lm_eval --tasks`` computes: the verdict has no metric code of its own.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    began = time.perf_counter()
    known = {"tokenizer": tokenizer, **metadata}
    manager = TaskManager(include_path=[str(tasks_dir())], include_defaults=False, metadata=known)
    out = simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True
    )
    result = Measurement()
    for task in tasks:
        scores = out["results"][task]
        names = [key.removesuffix(",none") for key in scores if key.endswith(",none")]
        result.values[task] = {
            name: Interval(*(float(scores[f"{name}{end},none"]) for end in ("", "_low", "_high")))
            for name in names
            if f"{name}_low" in names
        }
        samples = sorted(out["samples"][task], key=lambda sample: sample["doc_id"])
        common = [name for name in result.values[task] if all(name in sample for sample in samples)]
        result.samples[task] = {name: [_number(sample[name]) for sample in samples] for name in common}
        result.groups[task] = [str(sample[common[0]][-1]) for sample in samples]
    result.seconds = round(time.perf_counter() - began, 1)
    return result


def _number(value: Sequence[Any]) -> float:
    """``(number, group)``, or the mean of ``(sum, tokens, group)``."""
    return float(value[0]) if len(value) == 2 else float(value[0]) / float(value[1])
