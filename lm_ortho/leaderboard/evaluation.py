"""Evaluates one task on one model at one alpha: returns the numbers for the store and writes lm-eval's own files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_ortho.data.chat import render_turn
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError, printable
from lm_ortho.files import make_private_directory, temporary_name

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only
_NORMAL_95 = 1.96


def load_lm(place: str, has_alpha: bool, options: Mapping[str, Any]) -> Any:
    """The lm-eval model of a directory, in each process of torchrun: ``LibOrthoLM`` if it has an alpha, else ``hf``."""
    from lm_ortho.harness import tokens
    from lm_ortho.harness.baseline_model import BaselineLM
    from lm_ortho.harness.model import LibOrthoLM

    if has_alpha:
        return LibOrthoLM(place, **options)
    lm = BaselineLM(place, **options)
    tokens.register(lm)
    return lm


def check_options(dtype: str, batch_size: int | str) -> None:
    """Raises ``UserError`` for a dtype or batch size that no model takes; found later, every piece would fail by it."""
    import torch

    from lm_ortho.runtime.device import check_batch_size, choose_dtype

    choose_dtype(dtype, "cpu", torch.float32)
    check_batch_size(batch_size)


def check_chat(tokenizer: Any, chat: Mapping[str, Any]) -> None:
    """Raises ``UserError`` where the tokenizer cannot render a question as ``chat`` asks it.

    ``chat`` has ``apply_chat_template``, ``system_instruction`` and ``chat_template_args``. lm-eval itself would leave
    out a system message that the template refuses.
    """
    template, templates = chat["apply_chat_template"], getattr(tokenizer, "chat_template", None)
    if not templates:
        raise UserError("apply_chat_template: the tokenizer has no chat template")
    template_args = dict(chat.get("chat_template_args") or {})
    if isinstance(template, str):
        if not (isinstance(templates, Mapping) and template in templates):
            names = f"has {', '.join(templates)}" if isinstance(templates, Mapping) else "has one without a name"
            raise UserError(f"apply_chat_template={printable(template, 80)!r}: the tokenizer {names}")
        template_args["chat_template"] = template
    render_turn(
        Row(question="Where was Ada born?", answer="Ada was born in Rome."),
        tokenizer,
        system_instruction=chat.get("system_instruction") or "",
        chat_template_args=template_args,
    )


@lru_cache(maxsize=8)
def _load_task_manager(defaults: bool, metadata: str) -> Any:
    import json

    from lm_eval.tasks import TaskManager

    from lm_ortho.plugin.bridges import find_tasks_dir

    return TaskManager(
        include_path=[str(find_tasks_dir())], include_defaults=defaults, metadata=json.loads(metadata) or None
    )


def make_task_manager(tasks: Iterable[str], metadata: Mapping[str, Any]) -> Any:
    """A task manager that knows the tasks. lm-eval's own tasks are indexed only if needed: it takes ten seconds."""
    import json

    try:
        metadata_text = json.dumps(dict(metadata), sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:  # YAML has dates and sets, which the tasks do not expect
        raise UserError(f"metadata: {error}; put such a value in quotes") from None
    manager = _load_task_manager(False, metadata_text)
    if all(task in manager.task_index for task in tasks):
        return manager
    return _load_task_manager(True, metadata_text)


def expand_groups(names: Sequence[str], metadata: Mapping[str, Any]) -> list[str]:
    """The names with groups replaced by their tasks; ``UserError`` with the closest match for an unknown name."""
    import difflib

    manager = make_task_manager(names, metadata)
    tasks: dict[str, None] = {}
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; `lm-eval ls tasks` lists them"
            raise UserError(f"tasks: {name!r} is unknown{hint}")
        tasks |= dict.fromkeys(_expand_group(name, manager))
    return list(tasks)


def _expand_group(name: str, manager: Any) -> list[str]:
    entry = manager.task_index[name]
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        return [name]  # tags, and groups that change their tasks, are not expanded
    tasks = list[str]()
    for member in members:
        tasks += _expand_group(member, manager) if member in manager.task_index else [member]
    return tasks


def evaluate(lm: Any, config: Mapping[str, Any], results: Path) -> dict[str, Any] | None:
    """Evaluates one piece and returns its result for the store; None in all processes but the first.

    ``values[task][metric]`` is (value, low, high, whether higher is better), unknown bounds None; ``samples`` holds a
    number per document and ``groups`` the subject of each. lm-eval's files appear in ``results`` when they are
    complete.
    """
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    task, alpha, metadata, chat = config["task"], config["alpha"], config["metadata"], config.get("chat", {})
    if alpha is not None:
        lm.alpha = alpha
    make_private_directory(results.parent)  # before lm-eval writes rows there
    scratch = results.parent / temporary_name(results)
    tracker = EvaluationTracker(output_path=str(scratch))
    out = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=make_task_manager([task], metadata),
        limit=config["limit"],
        bootstrap_iters=0,
        log_samples=True,
        evaluation_tracker=tracker,
        apply_chat_template=chat.get("apply_chat_template", False),
        system_instruction=chat.get("system_instruction"),
        random_seed=config["seeds"]["random"],
        numpy_random_seed=config["seeds"]["numpy"],
        torch_random_seed=config["seeds"]["torch"],
    )
    if out is None:
        return None
    samples = out.pop("samples")
    out["config"] |= {"model": "libortho" if alpha is not None else "hf", "model_args": config["model_args"]}
    summary = _summarise(out, samples)
    try:
        summary["files"] = _write_lm_eval_files(tracker, out, samples, scratch, results)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return summary


def _write_lm_eval_files(
    tracker: Any, out: dict[str, Any], samples: dict[str, Any], scratch: Path, results: Path
) -> list[str]:
    """Writes the files of ``lm_eval --output_path --log_samples`` and moves them into ``results``; their names."""
    tracker.general_config_tracker.model_source = out["config"]["model"]
    tracker.general_config_tracker.model_name_sanitized = "new"
    tracker.save_results_aggregated(results=out, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    files = sorted((scratch / "new").glob("*")) if (scratch / "new").is_dir() else []
    if len(files) != 1 + len(samples):
        raise UserError(f"out={str(results)!r}: lm-eval could not write its results (no space left?)")
    make_private_directory(results)
    for file in files:
        os.replace(file, results / file.name)
    return [file.name for file in files]


def _summarise(out: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    config, higher_is_better = out["config"], out["higher_is_better"]
    return {
        "values": {
            task: _read_metrics(scores, higher_is_better.get(task, {})) for task, scores in out["results"].items()
        },
        "samples": {task: _read_samples(rows) for task, rows in samples.items()},
        "unavailable": {task: _read_reasons(scores) for task, scores in out["results"].items()},
        "groups": {task: _read_groups(rows) for task, rows in samples.items()},
        "documents": {task: [row["doc_hash"][:12] for row in rows] for task, rows in samples.items()},
        "versions": out["versions"],
        "git": out.get("git_hash"),
        "kernel": config.get("kernel", ["torch"]),
        "checkpoint": config.get("checkpoint", ""),
        "dtype": str(config.get("model_dtype", "")),
        "density": config.get("density"),
        "bits_per_weight": config.get("bits_per_weight"),
    }


def _read_metrics(scores: Mapping[str, Any], higher_is_better: Mapping[str, Any]) -> dict[str, list[Any]]:
    """By metric of a task: value, low, high, whether higher is better. Bounds and errors are no metrics themselves."""
    plain = {_strip_filter(key): value for key, value in scores.items() if "," in key}
    values = {}
    for name, value in plain.items():
        metric, _, kind = name.partition(",")
        suffix = f",{kind}" if kind else ""
        if metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if any(metric.endswith(bound) and metric.removesuffix(bound) + suffix in plain for bound in ("_low", "_high")):
            continue
        low, high = (plain.get(f"{metric}{bound}{suffix}") for bound in ("_low", "_high"))
        error = plain.get(f"{metric}_stderr{suffix}")
        if low is None and isinstance(error, int | float):
            low, high = value - _NORMAL_95 * error, value + _NORMAL_95 * error
        values[name] = [float(value), low, high, higher_is_better.get(metric)]
    return values


def _read_reasons(scores: Mapping[str, Any]) -> dict[str, str]:
    """The reason by metric of a task that could not be computed."""
    plain = {_strip_filter(key): value for key, value in scores.items() if "," in key and isinstance(value, str)}
    return {
        name: value.removeprefix("n/a: ")
        for name, value in plain.items()
        if value.startswith("n/a: ") and not name.endswith(("_low", "_high", "_stderr"))
    }


def _strip_filter(key: str) -> str:
    """The key without the default filter: ``metric``, or ``metric,filter`` where the filter is not none."""
    return key.removesuffix(",none")


def _read_samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """A number per document and metric; None where a document has none."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"] if not name.endswith(("_low", "_high")))
    columns = {name: [_to_number(row.get(name)) for row in rows] for name in names}
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _to_number(value: Any) -> float | None:
    """A number, the number of ``(number, group)``, or the mean of ``(sum, tokens, group)``."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, list | tuple) or not all(isinstance(part, int | float) for part in value[:-1]):
        return None
    if len(value) == 2:
        return float(value[0])
    return value[0] / value[1] if len(value) == 3 else None


def _read_groups(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The group (subject) of each document; a document without one is a group of its own."""
    groups = []
    for row in rows:
        doc = row["doc"] if isinstance(row["doc"], Mapping) else {}
        groups.append(str(doc.get("group") or f"document {row['doc_id']}"))
    return groups
