"""``lm-ortho demo``: the dial at both ends, in one lm-eval table."""

from __future__ import annotations

from typing import Annotated

import typer

TASKS = "tofu_forget,tofu_retain"


def demo(
    tasks: Annotated[str, typer.Option(help="Tasks of ours, separated by commas.")] = TASKS,
    alpha: Annotated[str, typer.Option(help="Values of the dial, separated by commas.")] = "0,1",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
) -> None:
    """Evaluate the embedded model at alpha=0 and alpha=1 and print one table.

    The same as `lm_eval --model libortho --model_args alpha=0 --tasks tofu_forget,tofu_retain` and once more
    with alpha=1, but the model is loaded once and lm-eval's own tasks are not indexed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from lm_ortho.config import format_alpha, parse_alpha
    from lm_ortho.harness.model import LibOrthoLM
    from lm_ortho.leaderboard.evaluation import leaf_tasks, manager_for

    names = tasks.split(",")
    leaf_tasks(names, {})  # an unknown one is told before the model is loaded
    dials = [parse_alpha(value) for value in alpha.split(",")]
    lm, manager = LibOrthoLM(), manager_for(names, {})
    joined: dict[str, dict[str, object]] = {}
    for dial in dials:
        lm.alpha = dial
        found = simple_evaluate(model=lm, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
        for part in ("results", "versions", "n-shot", "higher_is_better"):
            for task, value in found[part].items():
                label = f"{task} alpha={format_alpha(dial)}"
                named = value | {"alias": label} if part == "results" else value
                joined.setdefault(part, {})[label] = named
    typer.echo(make_table(joined))
