"""One task on one model at one alpha: numbers for the store, and lm-eval's own files beside it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.files import make_private_directory, temporary_name

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only
_NORMAL_95 = 1.96


def load_lm(place: str, dial: bool, options: Mapping[str, Any]) -> Any:
    """The lm-eval model of a directory: with a dial ours, else lm-eval's own; in each process of torchrun."""
    from lm_ortho.harness import tokens
    from lm_ortho.harness.baseline_model import BaselineLM
    from lm_ortho.harness.model import LibOrthoLM

    if dial:
        return LibOrthoLM(place, **options)
    lm = BaselineLM(place, **options)
    tokens.register(lm)
    return lm


@lru_cache(maxsize=8)
def _manager(defaults: bool, metadata: str) -> Any:
    import json

    from lm_eval.tasks import TaskManager

    from lm_ortho.plugin.bridges import tasks_dir

    return TaskManager(
        include_path=[str(tasks_dir())], include_defaults=defaults, metadata=json.loads(metadata) or None
    )


def manager_for(tasks: Iterable[str], metadata: Mapping[str, Any]) -> Any:
    """A task manager that knows the tasks; lm-eval's own are indexed, which takes ten seconds, only where needed."""
    import json

    told = json.dumps(dict(metadata), sort_keys=True)
    ours = _manager(False, told)
    return ours if all(task in ours.task_index for task in tasks) else _manager(True, told)


def leaf_tasks(names: Sequence[str], metadata: Mapping[str, Any]) -> list[str]:
    """The tasks of the names, groups taken apart; ``UserError`` with the closest for an unknown one."""
    import difflib

    manager = manager_for(names, metadata)
    found: dict[str, None] = {}
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; `lm-eval ls tasks` lists them"
            raise UserError(f"tasks: {name!r} is unknown{hint}")
        found |= dict.fromkeys(_leaves(name, manager))
    return list(found)


def _leaves(name: str, manager: Any) -> list[str]:
    entry = manager.task_index[name]
    below = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(below, list) or not all(isinstance(part, str) for part in below):
        return [name]  # tags, and groups that change their tasks, stay whole
    return [leaf for part in below for leaf in (_leaves(part, manager) if part in manager.task_index else [part])]


def evaluate(lm: Any, config: Mapping[str, Any], results: Path) -> dict[str, Any] | None:
    """What the store keeps of one piece; on any process but the first None.

    ``values[task][metric]`` is (value, low, high), the bounds None where there are none; ``samples`` holds a number per
    document and ``groups`` whom it is about. lm-eval's files appear in ``results`` when they are whole.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    task, alpha, metadata = config["task"], config["alpha"], config["metadata"]
    if alpha is not None:
        lm.alpha = alpha
    scratch = results.parent / temporary_name(results)
    tracker = EvaluationTracker(output_path=str(scratch))
    out = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=manager_for([task], metadata),
        limit=config["limit"],
        bootstrap_iters=0,
        log_samples=True,
        evaluation_tracker=tracker,
        random_seed=config["seeds"]["random"],
        numpy_random_seed=config["seeds"]["numpy"],
        torch_random_seed=config["seeds"]["torch"],
    )
    if out is None:
        return None
    samples = out.pop("samples")
    out["config"] |= {"model": "libortho" if alpha is not None else "hf", "model_args": config["model_args"]}
    kept = _kept(out, samples)
    try:
        kept["files"] = _written(tracker, out, samples, scratch, results)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return kept


def _written(tracker: Any, out: dict[str, Any], samples: dict[str, Any], scratch: Path, results: Path) -> list[str]:
    """Saves what ``lm_eval --output_path --log_samples`` would, and moves it into ``results``."""
    tracker.general_config_tracker.model_source = out["config"]["model"]
    tracker.general_config_tracker.model_name_sanitized = "new"
    tracker.save_results_aggregated(results=out, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    written = sorted((scratch / "new").glob("*")) if (scratch / "new").is_dir() else []
    if len(written) != 1 + len(samples):
        raise UserError(f"out={str(results)!r}: lm-eval could not write its results (no space left?)")
    make_private_directory(results)
    for file in written:
        os.replace(file, results / file.name)
    return [file.name for file in written]


def _kept(out: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    config, better = out["config"], out["higher_is_better"]
    return {
        "values": {task: _values(scores, better.get(task, {})) for task, scores in out["results"].items()},
        "samples": {task: _numbers(rows) for task, rows in samples.items()},
        "groups": {task: _groups(rows) for task, rows in samples.items()},
        "documents": {task: [row["doc_hash"][:12] for row in rows] for task, rows in samples.items()},
        "versions": out["versions"],
        "git": out.get("git_hash"),
        "kernel": config.get("kernel", ["torch"]),
        "checkpoint": config.get("checkpoint", ""),
        "dtype": str(config.get("model_dtype", "")),
        "density": config.get("density"),
        "bits_per_weight": config.get("bits_per_weight"),
    }  # fmt: skip


def _values(scores: Mapping[str, Any], better: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Metrics of a task without their bounds and errors: value, low, high, whether higher is better."""
    plain = {_name(key): value for key, value in scores.items() if "," in key}
    values = {}
    for name, value in plain.items():
        metric, _, kind = name.partition(",")
        end = f",{kind}" if kind else ""
        if metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if any(metric.endswith(bound) and metric.removesuffix(bound) + end in plain for bound in ("_low", "_high")):
            continue
        low, high = (plain.get(f"{metric}{bound}{end}") for bound in ("_low", "_high"))
        error = plain.get(f"{metric}_stderr{end}")
        if low is None and isinstance(error, int | float):
            low, high = value - _NORMAL_95 * error, value + _NORMAL_95 * error
        values[name] = [float(value), low, high, better.get(metric)]
    return values


def _name(key: str) -> str:
    """``metric``, or ``metric,filter`` where the filter is not the usual none."""
    return key.removesuffix(",none")


def _numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """A number per document and metric; None where a document has none."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"] if not name.endswith(("_low", "_high")))
    every = {name: [_number(row.get(name)) for row in rows] for name in names}
    return {name: values for name, values in every.items() if any(value is not None for value in values)}


def _number(value: Any) -> float | None:
    """A number, the number of ``(number, group)``, or the mean of ``(sum, tokens, group)``."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, list | tuple) or not all(isinstance(part, int | float) for part in value[:-1]):
        return None
    return {2: lambda: float(value[0]), 3: lambda: value[0] / value[1]}.get(len(value), lambda: None)()


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whom each document is about; its own number where it does not say."""
    found = []
    for row in rows:
        doc = row["doc"] if isinstance(row["doc"], Mapping) else {}
        found.append(str(doc.get("group") or f"document {row['doc_id']}"))
    return found
