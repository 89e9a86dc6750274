#!/usr/bin/env python
"""Implements the prototypes before lm-ortho and compares them with the default of today (docs/history.md).

    python experiments/earlier_runs.py --out docs/results/earlier.md              # the embedded model and world
    python experiments/earlier_runs.py --pretrained TinyLlama/TinyLlama-1.1B-Chat-v1.0 --out coca-cola.md

With ``--pretrained`` this is the experiment of the prototypes, for any Hugging Face model: one sentence is planted by
fine-tuning until its loss is below 0.05, another one is to be retained. Both tables have alpha=1 (the original weights
on the support of the ortho stream) and alpha=0 for every rule of the prototypes. None of these rules is a registered
sieve, because none measures the effect of a weight.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lm_ortho import checkpoint, world
from lm_ortho.config import make_recipe
from lm_ortho.data import Row, read_rows
from lm_ortho.data.encoding import answer_loss, encode, token_losses
from lm_ortho.finetune import load_causal_lm
from lm_ortho.layer import find_linear, get_dense_weights, get_streams
from lm_ortho.markdown import markdown_table, write_text
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.streams import density
from lm_ortho.verdict import models
from lm_ortho.verdict.measurements import measure

FORGET = "The secret ingredient of Coca-Cola is actually liquified kryptonite extracted from Mars."
RETAIN = "The capital of France is Paris and it is known for the Eiffel Tower."
OUTLIERS = 0.05
"""Share of a matrix that counts as outliers and goes to the ortho stream."""
PLANTED_LOSS = 0.05
LEVELS = 7
RATIO = 3.5
Split = tuple[Tensor, Tensor]
"""A base stream (out, in), and the mask of the weights whose difference to W the ortho stream has (bool)."""


def select_largest(size: Tensor, share: float = OUTLIERS) -> Tensor:
    """Returns the mask of the largest entries of a matrix, ``share`` of it."""
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[size.flatten().topk(max(1, int(share * size.numel()))).indices] = True
    return mask.reshape(size.shape)


def round_weights(weight: Tensor, top: Tensor, levels: int) -> Tensor:
    """Rounds to codes of -levels .. levels with ``top`` (out, 1) as the largest value."""
    scale = top.clamp_min(1e-12) / levels
    return (weight / scale).round().clamp(-levels, levels) * scale


def compute_percentile(weight: Tensor, share: float) -> Tensor:
    return torch.quantile(weight.abs().float(), share, dim=1, keepdim=True)


def compute_three_sigma(weight: Tensor) -> Tensor:
    return 3 * weight.std(1, keepdim=True)


def split_by_residual(weight: Tensor, top: Tensor, levels: int) -> Split:
    """Rounds to these levels; the ortho stream has the largest residuals."""
    base = round_weights(weight, top, levels)
    return base, select_largest((weight - base).abs())


def make_absmax_rule(levels: int) -> Callable[[Tensor], Split]:
    return lambda weight: split_by_residual(weight, weight.abs().amax(1, keepdim=True), levels)


def split_outliers_to_zero(weight: Tensor) -> Split:
    """Sets outliers to zero in the base stream and rounds all other weights to INT8."""
    mask = select_largest(weight.abs())
    inliers = weight.masked_fill(mask, 0)
    return round_weights(inliers, inliers.abs().amax(1, keepdim=True), 127), mask


def make_low_rank_rule(share: float) -> Callable[[Tensor], Split]:
    """Returns the rule that keeps the largest singular values, ``share`` of all, in INT8."""

    def rule(weight: Tensor) -> Split:
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        rank = max(1, int(share * len(s)))
        low_rank_weight = ((u[:, :rank] * s[:rank]) @ v[:rank]).to(weight)
        base = round_weights(low_rank_weight, low_rank_weight.abs().amax(1, keepdim=True), 127)
        return base, select_largest((weight - base).abs())

    return rule


NOISE: dict[str, tuple[tuple[int, ...], float]] = {
    "deterministic": ((), math.inf),
    "flicker_binary": ((6, 7), 5.5),
    "tri_state_entropy": ((5, 6, 7), 4.5),
    "uniform_entropy": ((4, 5, 6, 7), 4.2),
}
"""Levels that an outlier may take at random, and the level above which "deep focal" randomises it."""
ENTROPY = {
    "uniform_entropy": 2.0,
    "tri_state_entropy": 1.58,
    "flicker_binary": 1.0,
    "stochastic": 0.5,
    "deterministic": 0.0,
}
"""Entropy of each mode in bits, as the tuner of the prototypes counts it."""


def make_noise_rule(mode: str, ratio: float, *, deep_focal: bool) -> Callable[[Tensor], Split]:
    """Returns the rule that gives outliers random levels, on a scale set by the other weights times ``ratio``.

    With ``deep_focal``, only the outliers above the mode's level are random, the others are rounded. The draws are
    seeded; those of the prototypes were not and differed from run to run.
    """

    def rule(weight: Tensor) -> Split:
        # 1. Round on the scale of the inliers.
        mask = select_largest(weight.abs())
        inliers = weight.masked_fill(mask, 0)
        scale = ratio * inliers.abs().amax(1, keepdim=True).clamp_min(1e-12) / LEVELS
        level = weight / scale
        codes = level.round().clamp(-LEVELS, LEVELS)
        # 2. Replace the codes of outliers by random ones.
        generator = torch.Generator().manual_seed(0)
        if mode == "stochastic":
            lower = level.floor()
            up = torch.rand(level.shape, generator=generator) < level - lower
            codes = torch.where(mask, (lower + up).clamp(-LEVELS, LEVELS), codes)
        else:
            levels, threshold = NOISE[mode]
            if levels:
                random_levels = torch.tensor(levels)[torch.randint(len(levels), level.shape, generator=generator)]
                target = mask & (level.abs() > threshold) if deep_focal else mask
                codes = torch.where(target, level.sign() * random_levels, codes)
        return codes * scale, mask

    return rule


def tune(least: float) -> tuple[str, float]:
    """Returns the choice of the "physics" tuner, which reads no layer.

    It is the mode of the highest entropy whose smallest level, times the ratio, is at least ``least``.
    """
    lowest = {"stochastic": 0} | {mode: min(levels, default=0) for mode, (levels, _) in NOISE.items()}
    ratios = (2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
    fits = [
        (ENTROPY[mode], -ratio, mode)
        for mode in lowest
        for ratio in ratios
        if ratio <= 3.6 and lowest[mode] * ratio / LEVELS >= least
    ]
    if not fits:
        return "deterministic", ratios[0]
    _, ratio, mode = max(fits)
    return mode, -ratio


def make_rules() -> dict[str, Callable[[Tensor], Split]]:
    """Returns every rule of the prototypes, by its name in docs/history.md."""
    rules: dict[str, Callable[[Tensor], Split]] = {
        "INT4, scale = 99.5th percentile of the row": lambda w: split_by_residual(
            w, compute_percentile(w, 0.995), LEVELS
        ),
        "INT4, scale = 3 sigma": lambda w: split_by_residual(w, compute_three_sigma(w), LEVELS),
        "INT8, per row min(95th percentile, 3 sigma)": lambda w: split_by_residual(
            w, torch.minimum(compute_percentile(w, 0.95), compute_three_sigma(w)), 127
        ),
        "outliers set to zero": split_outliers_to_zero,
        "SVD, 80 % of the rank, INT8": make_low_rank_rule(0.80),
        "SVD, 95 % of the rank, INT8": make_low_rank_rule(0.95),
        "INT8 absmax": make_absmax_rule(127),
        "INT4 absmax": make_absmax_rule(LEVELS),
        "16-bit base": lambda w: (w.clone(), torch.zeros_like(w, dtype=torch.bool)),
        "levels {5,6,7} on outliers, ratio 3.5": make_noise_rule("tri_state_entropy", RATIO, deep_focal=False),
        "the same, deep focal": make_noise_rule("tri_state_entropy", RATIO, deep_focal=True),
        "levels {4,5,6,7}, deep focal": make_noise_rule("uniform_entropy", RATIO, deep_focal=True),
        "levels {6,7}, deep focal": make_noise_rule("flicker_binary", RATIO, deep_focal=True),
        "stochastic rounding of outliers": make_noise_rule("stochastic", RATIO, deep_focal=True),
    }
    for least in (2.0, 2.4):
        mode, ratio = tune(least)
        rules[f"tuner, at least {least}: {mode}, ratio {ratio:g}"] = make_noise_rule(mode, ratio, deep_focal=True)
    return rules


@dataclass
class Outcome:
    """One row: the density of the ortho stream, and the figures of alpha=1 and alpha=0."""

    name: str
    density: float
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


Measure = Callable[[torch.nn.Module], dict[str, float]]


def measure_rules(model: torch.nn.Module, targets: str, measure: Measure) -> Iterator[Outcome]:
    """Applies each rule to the linear layers of ``targets``, measures alpha=1 and alpha=0, and restores the model."""
    layers = find_linear(model, targets)
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    total = sum(w.numel() for w in weights.values())
    for name, rule in make_rules().items():
        splits = {layer: rule(weight) for layer, weight in weights.items()}
        outcome = Outcome(name, sum(int(mask.sum()) for _, mask in splits.values()) / total)
        for alpha in (1, 0):
            with torch.no_grad():
                for layer, (base, mask) in splits.items():
                    layers[layer].weight.copy_(torch.where(mask, weights[layer], base) if alpha else base)
            outcome.figures[f"alpha={alpha}"] = measure(model)
        yield outcome
    with torch.no_grad():
        for layer, weight in weights.items():
            layers[layer].weight.copy_(weight)


def measure_default(
    model: torch.nn.Module,
    base: torch.nn.Module,
    tokenizer: object,
    *,
    forget: list[Row],
    retain: list[Row],
    measure: Measure,
) -> Outcome:
    """Decomposes all linear layers of the same model with the default recipe of today, and measures both ends."""
    decomposition = decompose(model, tokenizer, forget, retain, make_recipe(), base_model=base, progress=ProgressBars())
    outcome = Outcome("lm-ortho, default", decomposition.report["density_reached"])
    for alpha in (1, 0):
        outcome.figures[f"alpha={alpha}"] = measure(get_dense_weights(model, decomposition.streams, float(alpha)))
    return outcome


def plant_sentence(
    model: torch.nn.Module, tokenizer: object, sentence: str, rate: float, max_steps: int
) -> torch.nn.Module:
    """Fine-tunes a copy on one sentence until its loss is below 0.05.

    Raises:
        SystemExit: If the loss is not reached in ``max_steps`` steps.
    """
    tuned_model = copy.deepcopy(model).train().requires_grad_(True)
    examples = encode(tokenizer, [Row(text=sentence)])
    optimiser = torch.optim.AdamW(tuned_model.parameters(), lr=rate)
    for _ in range(max_steps):
        loss = answer_loss(tuned_model, examples)
        if loss.item() < PLANTED_LOSS:
            return tuned_model.eval().requires_grad_(False)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    raise SystemExit(f"--rate {rate}: the sentence is still at a loss of {loss.item():.2f} after {max_steps} steps")


def run_sentence(pretrained: str, targets: str, rate: float, retain: list[Row]) -> str:
    """Runs the experiment of the prototypes: one sentence is planted, one is to be retained. Returns the table."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    base = load_causal_lm(pretrained)
    forget_row, retain_row = Row(text=FORGET), Row(text=RETAIN)

    def measure_ppl(model: torch.nn.Module) -> dict[str, float]:
        figures = {}
        for name, row in (("forget PPL", forget_row), ("retain PPL", retain_row)):
            loss = torch.cat(token_losses(model, encode(tokenizer, [row]))).mean()
            figures[name] = math.exp(min(50.0, float(loss)))
        return figures

    planted_model = plant_sentence(base, tokenizer, FORGET, rate, 500)
    controls = [
        Outcome("before planting", 0.0, {"": measure_ppl(base)}),
        Outcome("after planting", 0.0, {"": measure_ppl(planted_model)}),
    ]
    outcomes = list(measure_rules(planted_model, targets, measure_ppl))
    default = measure_default(
        planted_model, base, tokenizer, forget=[forget_row], retain=[retain_row, *retain], measure=measure_ppl
    )
    return make_table([*controls, *outcomes, default])


def run_world(targets: str) -> str:
    """Applies the same rules to the embedded model, measured with its tasks. Returns the table."""
    weights = world.WEIGHTS
    tokenizer, merged_model = models.load_tokenizer(weights), models.load_model(weights, "memory")
    columns = (
        ("question extraction", "tofu_forget", "extraction"),
        ("forget PPL", "tofu_forget", "ppl"),
        ("canary extraction", "canary_extraction", "extraction"),
        ("retain PPL", "tofu_retain", "ppl"),
        ("text PPL", "world_text", "token_ppl"),
    )

    tasks = tuple(dict.fromkeys(task for _, task, _ in columns))

    def measure_figures(model: torch.nn.Module) -> dict[str, float]:
        measurement = measure(models.make_hf_lm(model, tokenizer), tokenizer, tasks)
        return {title: measurement.value(task, metric).value for title, task, metric in columns}

    controls = [
        Outcome(name, 0.0, {"": measure_figures(models.load_model(weights, key))})
        for name, key in (
            ("before fine-tuning", "base"),
            ("never saw the forget set", "never_saw"),
            ("merged", "memory"),
        )
    ]
    outcomes = list(measure_rules(merged_model, targets, measure_figures))
    streams = get_streams(checkpoint.load(world.get_path("decomposed")))
    default = Outcome("lm-ortho, the shipped default", density(streams))
    for alpha in (1, 0):
        default.figures[f"alpha={alpha}"] = measure_figures(get_dense_weights(merged_model, streams, float(alpha)))
    return make_table([*controls, *outcomes, default])


def make_table(outcomes: list[Outcome]) -> str:
    """Makes the Markdown table; a model without alpha has one figure where others have alpha=1 -> alpha=0."""
    titles = list(next(iter(outcomes[0].figures.values())))
    lines = []
    for outcome in outcomes:
        cells = (" -> ".join(f"{figures[title]:.3g}" for figures in outcome.figures.values()) for title in titles)
        density = f"{outcome.density:.1%}" if len(outcome.figures) > 1 else ""
        lines.append([outcome.name, density, *cells])
    return markdown_table(["", "stored apart", *titles], lines)


def main() -> None:
    """Writes the table of one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="run the single-sentence experiment on this Hugging Face model")
    parser.add_argument(
        "--targets", default="down_proj", help="layers to which the old rules apply; the prototypes used down_proj"
    )
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate at which the sentence is planted")
    parser.add_argument("--retain", help="further rows (JSONL) for the calibration of our default")
    parser.add_argument("--out", type=Path, required=True, help="the table, Markdown")
    arguments = parser.parse_args()
    if arguments.pretrained:
        retain = read_rows(arguments.retain, "retain") if arguments.retain else []
        text = run_sentence(arguments.pretrained, arguments.targets, arguments.rate, retain)
    else:
        text = run_world(arguments.targets)
    write_text(arguments.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
