#!/usr/bin/env python
"""Forget quality and model utility of the logs that the authors of TOFU published, by ``lm_ortho.metrics.tofu``.

    git clone --depth 1 https://github.com/locuslab/tofu
    D=tofu/data/ft_epoch5_lr1e-05_llama2-7b
    python experiments/published_tofu.py --unlearned ${D}_full_wd0.01/eval_results/ds_size300/eval_log_aggregated.json \
        --retain ${D}_retain90_wd0.01/eval_results/ds_size300/eval_log_aggregated.json

Nothing is run but the metrics. The published values of these two: p = 1.834e-21, utilities 0.6227 and 0.6137.
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


def column(log: dict[str, Any], name: str) -> np.ndarray[Any, Any]:
    """One value, or several, for each question of a log."""
    return np.array(list(log[name].values()))


def ratios(log: dict[str, Any]) -> Any:
    """R of each question."""
    return tofu.truth_ratio(column(log, "average_perturb_loss"), column(log, "avg_paraphrased_loss"))


def utility(logs: dict[str, Any]) -> float:
    """Model utility of the three sets that should stay."""
    means = {}
    for name, file in FILES.items():
        log = logs[file]
        losses = column(log, "avg_gt_loss")
        alone = name == "retain"
        prob = np.exp(-losses) if alone else tofu.choice_probability(losses, column(log, "average_perturb_loss"))
        means[name] = {
            "prob": float(prob.mean()),
            "rouge": float(column(log, "rougeL_recall").mean()),
            "truth_ratio": tofu.kept_truth_ratio(ratios(log)),
        }
    return tofu.model_utility(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unlearned", type=Path, required=True, help="aggregated log of the model under test")
    parser.add_argument("--retain", type=Path, required=True, help="aggregated log of the retain-only model")
    given = parser.parse_args()
    logs = {name: json.loads(getattr(given, name).read_text()) for name in ("unlearned", "retain")}
    quality = tofu.forget_quality(*(ratios(log[FORGET]) for log in logs.values()))
    print(f"forget quality {quality:.4g}")
    for name, log in logs.items():
        truth = tofu.forget_truth_ratio(ratios(log[FORGET]))
        print(f"{name}: model utility {utility(log):.4f}, forget truth ratio {truth:.4f}")


if __name__ == "__main__":
    main()
