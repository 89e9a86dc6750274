"""``lm-ortho demo``: evaluates the embedded model at both ends of alpha, in one lm-eval table."""

from __future__ import annotations

from typing import Annotated

import typer

TASKS = "tofu_forget,tofu_retain"


def demo(
    tasks: Annotated[str, typer.Option(help="Tasks of this package, separated by commas.")] = TASKS,
    alpha: Annotated[str, typer.Option(help="Values of alpha, separated by commas.")] = "0,1",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of documents per task, the first ones.")] = None,
) -> None:
    """Evaluate the embedded model at alpha=0 and alpha=1 and print one table.

    This equals `lm_eval --model libortho --model_args alpha=0 --tasks tofu_forget,tofu_retain` and the same with
    alpha=1, but the model is loaded once and lm-eval's own tasks are not indexed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    from lm_ortho.dial import format_alpha, parse_alpha
    from lm_ortho.harness.model import LibOrthoLM
    from lm_ortho.leaderboard.evaluation import expand_groups, make_task_manager

    names = tasks.split(",")
    expand_groups(names, {})  # refuses an unknown task before the model is loaded
    alphas = [parse_alpha(value) for value in alpha.split(",")]
    lm, manager = LibOrthoLM(), make_task_manager(names, {})
    results: dict[str, dict[str, object]] = {}
    for value in alphas:
        lm.alpha = value
        evaluation = simple_evaluate(model=lm, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
        for part in ("results", "versions", "n-shot", "higher_is_better"):
            for task, entry in evaluation[part].items():
                label = f"{task} alpha={format_alpha(value)}"
                results.setdefault(part, {})[label] = entry | {"alias": label} if part == "results" else entry
    typer.echo(make_table(results))
