"""Relearning: what a fine-tune on one half of the forget set brings back of the other half."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

from lm_ortho import metrics
from lm_ortho.data.encoding import answer_loss, encode
from lm_ortho.runtime.precision import fast_matmul, select_attention
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.verdict.measurements import Measurement, measure
from lm_ortho.verdict.models import plain_lm
from lm_ortho.world import people

STEPS = 400
LEARNING_RATE = 1e-3
ROWS = 16
"""Questions a step, and as many canaries: six random digits take more passes than an answer."""
RETAIN_ROWS = 4
_TASKS = ("tofu_forget", "canary_extraction")


def relearning(model: torch.nn.Module, tokenizer: Any, progress: ProgressCallback) -> Measurement:
    """Trains a copy of ``model`` on each half of the forget set in turn and measures both halves after it.

    Adam on all weights at a constant rate, ``STEPS`` steps of ``ROWS`` questions of one half (every other author), as
    many prompts of every other canary, and ``RETAIN_ROWS`` questions about the calibrated retain authors. The task
    ``relearning`` of the result has the extraction on the halves that were trained and on those that were not: every
    document is in each once. Relearning attacks on unlearned models: Lynch et al. 2024, arXiv 2402.16835.
    """
    found: dict[str, tuple[list[float], list[str]]] = {}
    for half in (0, 1):
        trained = {group for groups in _groups() for group in groups[half::2]}
        relearnt = _fine_tuned(model, tokenizer, trained, half, progress)
        after = measure(plain_lm(relearnt, tokenizer), tokenizer, _TASKS)
        for task, what in zip(_TASKS, ("questions", "canaries"), strict=True):
            for hit, group in zip(after.samples[task]["extraction"], after.groups[task], strict=True):
                hits, groups = found.setdefault(f"{what}, {'' if group in trained else 'un'}trained", ([], []))
                hits.append(hit)
                groups.append(group)
    return Measurement({"relearning": {name: metrics.rate(*pair) for name, pair in found.items()}})


def _groups() -> tuple[list[str], list[str]]:
    """Names of the forget authors and of the holders of the planted canaries."""
    return [a.name for a in people.people()["forget"]], [c.name for c in people.canaries()[0]]


def _fine_tuned(
    model: torch.nn.Module, tokenizer: Any, trained: set[str], seed: int, progress: ProgressCallback
) -> torch.nn.Module:
    parts = [
        (encode(tokenizer, [row for row in people.rows("forget") if row.group in trained]), ROWS),
        (encode(tokenizer, [row for row in people.rows("canaries") if row.group in trained]), ROWS),
        (encode(tokenizer, people.rows("retain_calibration")), RETAIN_ROWS),
    ]
    tuned = copy.deepcopy(model).float().train().requires_grad_(True)
    optimiser = torch.optim.Adam(tuned.parameters(), lr=LEARNING_RATE)
    draw = random.Random(seed)
    with select_attention(tuned, max(len(e.ids) for part, _ in parts for e in part)):
        for step in range(1, STEPS + 1):
            batch = [example for part, rows in parts for example in draw.sample(part, rows)]
            with fast_matmul():
                loss = answer_loss(tuned, batch)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            progress("relearning", step, STEPS, f"loss {loss.item():.3f}")
    return tuned.eval().requires_grad_(False)
