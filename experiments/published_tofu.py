#!/usr/bin/env python
"""Computes forget quality and model utility of the logs that the authors of TOFU published, with our metrics.

    git clone --depth 1 https://github.com/locuslab/tofu
    D=tofu/data/ft_epoch5_lr1e-05_llama2-7b
    python experiments/published_tofu.py --unlearned ${D}_full_wd0.01/eval_results/ds_size300/eval_log_aggregated.json \
        --retain ${D}_retain90_wd0.01/eval_results/ds_size300/eval_log_aggregated.json

Only the metrics of ``lm_ortho.metrics.tofu`` run. The published values of these two logs are p = 1.834e-21 and
utilities 0.6227 and 0.6137.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from lm_ortho.metrics import tofu

FORGET = "eval_log_forget.json"
FILES = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}


def get_column(log: dict[str, Any], name: str) -> np.ndarray[Any, Any]:
    """Returns the value, or values, of each question of a log."""
    return np.array(list(log[name].values()))


def compute_ratios(log: dict[str, Any]) -> Any:
    """Computes the truth ratio R of each question."""
    return tofu.truth_ratio(get_column(log, "average_perturb_loss"), get_column(log, "avg_paraphrased_loss"))


def compute_utility(logs: dict[str, Any]) -> float:
    """Computes the model utility over the three sets to retain."""
    means = {}
    for name, file in FILES.items():
        log = logs[file]
        losses = get_column(log, "avg_gt_loss")
        if name == "retain":
            prob = np.exp(-losses)
        else:
            prob = tofu.choice_probability(losses, get_column(log, "average_perturb_loss"))
        means[name] = {
            "prob": float(prob.mean()),
            "rouge": float(get_column(log, "rougeL_recall").mean()),
            "truth_ratio": tofu.retain_truth_ratio(compute_ratios(log)),
        }
    return tofu.model_utility(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unlearned", type=Path, required=True, help="aggregated log of the model under test")
    parser.add_argument("--retain", type=Path, required=True, help="aggregated log of the retain-only model")
    arguments = parser.parse_args()
    logs = {name: json.loads(getattr(arguments, name).read_text()) for name in ("unlearned", "retain")}
    quality = tofu.forget_quality(*(compute_ratios(log[FORGET]) for log in logs.values()))
    print(f"forget quality {quality:.4g}")
    for name, log in logs.items():
        truth = tofu.forget_truth_ratio(compute_ratios(log[FORGET]))
        print(f"{name}: model utility {compute_utility(log):.4f}, forget truth ratio {truth:.4f}")


if __name__ == "__main__":
    main()
