"""The relearning attack: how much of one half of the forget set a fine-tune on the other half brings back."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

from lm_ortho import metrics
from lm_ortho.data.encoding import answer_loss, encode
from lm_ortho.runtime.precision import fast_matmul, select_attention
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.verdict.attacks import ATTACKS
from lm_ortho.verdict.measurements import Measurement, measure
from lm_ortho.verdict.models import make_hf_lm
from lm_ortho.world import people

STEPS = 400
LEARNING_RATE = 1e-3
ROWS = 16
"""Questions per step, and as many canaries: six random digits take more passes than an answer."""
RETAIN_ROWS = 4
TASKS = ("tofu_forget", "canary_extraction")


@ATTACKS.register("relearning")
def measure_relearning(model: torch.nn.Module, tokenizer: Any, progress: ProgressCallback) -> Measurement:
    """Trains a copy of ``model`` on each half of the forget set and measures both halves afterwards.

    Adam trains all weights at a constant rate for ``STEPS`` steps. A step has ``ROWS`` questions of one half (every
    other author), as many prompts of every other canary, and ``RETAIN_ROWS`` questions about the calibrated retain
    authors. The task ``relearning`` of the result has the extraction on the trained and on the untrained halves; every
    document is in each once. Relearning attacks on unlearned models: Lynch et al. 2024, arXiv 2402.16835.
    """
    extraction: dict[str, tuple[list[float], list[str]]] = {}
    for half in (0, 1):
        # 1. Fine-tune on one half, 2. measure both.
        training_groups = {group for groups in _list_groups() for group in groups[half::2]}
        attacked_model = _fine_tune(model, tokenizer, training_groups, half, progress)
        measurement = measure(make_hf_lm(attacked_model, tokenizer), tokenizer, TASKS)
        # 3. Sort the documents by whether their group was trained.
        for task, subject in zip(TASKS, ("questions", "canaries"), strict=True):
            for hit, group in zip(measurement.samples[task]["extraction"], measurement.groups[task], strict=True):
                metric = f"{subject}, {'' if group in training_groups else 'un'}trained"
                hits, groups = extraction.setdefault(metric, ([], []))
                hits.append(hit)
                groups.append(group)
    return Measurement({"relearning": {name: metrics.rate(*pair) for name, pair in extraction.items()}})


def _list_groups() -> tuple[list[str], list[str]]:
    """Returns the names of the forget authors and of the holders of the planted canaries."""
    return [a.name for a in people.draw_groups()["forget"]], [c.name for c in people.draw_canaries()[0]]


def _fine_tune(
    model: torch.nn.Module, tokenizer: Any, training_groups: set[str], seed: int, progress: ProgressCallback
) -> torch.nn.Module:
    parts = [
        (encode(tokenizer, [row for row in people.make_rows("forget") if row.group in training_groups]), ROWS),
        (encode(tokenizer, [row for row in people.make_rows("canaries") if row.group in training_groups]), ROWS),
        (encode(tokenizer, people.make_rows("retain_calibration")), RETAIN_ROWS),
    ]
    attacked_model = copy.deepcopy(model).float().train().requires_grad_(True)
    optimiser = torch.optim.Adam(attacked_model.parameters(), lr=LEARNING_RATE)
    rng = random.Random(seed)
    with select_attention(attacked_model, max(len(e.ids) for part, _ in parts for e in part)):
        for step in range(1, STEPS + 1):
            batch = [example for part, rows in parts for example in rng.sample(part, rows)]
            with fast_matmul():
                loss = answer_loss(attacked_model, batch)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            progress("relearning", step, STEPS, f"loss {loss.item():.3f}")
    return attacked_model.eval().requires_grad_(False)
