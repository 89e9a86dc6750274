#!/usr/bin/env python
"""What the prototypes before lm-ortho did, as code, beside the default of today (docs/history.md).

    python experiments/earlier_runs.py --out docs/results/earlier.md              # the embedded model and world
    python experiments/earlier_runs.py --pretrained TinyLlama/TinyLlama-1.1B-Chat-v1.0 --out coca-cola.md

With ``--pretrained`` it is their own experiment, for any Hugging Face model: one sentence is planted by fine-tuning
until its loss is below 0.05, another one must stay. Both tables give alpha=1 (the original weights where the ortho
stream is) and alpha=0 for every rule they tried. Nothing here is a registered sieve: none of it reads what a
weight does.
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
"""Share of a matrix that is called outliers and kept in the ortho stream."""
PLANTED_LOSS = 0.05
LEVELS = 7
RATIO = 3.5
Split = tuple[Tensor, Tensor]
"""A base (out, in) and where the ortho stream keeps the difference to W (bool)."""


def largest(size: Tensor, share: float = OUTLIERS) -> Tensor:
    """Where the largest entries of a matrix are, ``share`` of it."""
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[size.flatten().topk(max(1, int(share * size.numel()))).indices] = True
    return mask.reshape(size.shape)


def rounded(weight: Tensor, top: Tensor, levels: int) -> Tensor:
    """Codes of -levels .. levels with ``top`` (out, 1) as the largest value."""
    scale = top.clamp_min(1e-12) / levels
    return (weight / scale).round().clamp(-levels, levels) * scale


def percentile(weight: Tensor, share: float) -> Tensor:
    return torch.quantile(weight.abs().float(), share, dim=1, keepdim=True)


def sigmas(weight: Tensor) -> Tensor:
    return 3 * weight.std(1, keepdim=True)


def by_residual(weight: Tensor, top: Tensor, levels: int) -> Split:
    """Rounded to these levels; the ortho stream holds the largest residuals."""
    base = rounded(weight, top, levels)
    return base, largest((weight - base).abs())


def absmax(levels: int) -> Callable[[Tensor], Split]:
    return lambda weight: by_residual(weight, weight.abs().amax(1, keepdim=True), levels)


def hollow(weight: Tensor) -> Split:
    """Outliers become zero in the base, the rest is rounded to INT8."""
    mask = largest(weight.abs())
    rest = weight.masked_fill(mask, 0)
    return rounded(rest, rest.abs().amax(1, keepdim=True), 127), mask


def low_rank(share: float) -> Callable[[Tensor], Split]:
    """The largest singular values, as many as ``share`` of all, in INT8."""

    def rule(weight: Tensor) -> Split:
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        kept = max(1, int(share * len(s)))
        short = ((u[:, :kept] * s[:kept]) @ v[:kept]).to(weight)
        base = rounded(short, short.abs().amax(1, keepdim=True), 127)
        return base, largest((weight - base).abs())

    return rule


NOISE: dict[str, tuple[tuple[int, ...], float]] = {
    "deterministic": ((), math.inf),
    "flicker_binary": ((6, 7), 5.5),
    "tri_state_entropy": ((5, 6, 7), 4.5),
    "uniform_entropy": ((4, 5, 6, 7), 4.2),
}
"""Levels an outlier may take at random, and the level above which "deep focal" lets it."""
ENTROPY = {
    "uniform_entropy": 2.0,
    "tri_state_entropy": 1.58,
    "flicker_binary": 1.0,
    "stochastic": 0.5,
    "deterministic": 0.0,
}
"""Bits, as the tuner counts them."""


def noisy(mode: str, ratio: float, deep_focal: bool) -> Callable[[Tensor], Split]:
    """Outliers get random levels under a scale set by the rest; ``ratio`` stretches that scale.

    With ``deep_focal`` only the outliers above the mode's level are drawn, the others are rounded. The draws are
    seeded: the prototypes' own were not, so theirs differed from run to run.
    """

    def rule(weight: Tensor) -> Split:
        mask = largest(weight.abs())
        rest = weight.masked_fill(mask, 0)
        scale = ratio * rest.abs().amax(1, keepdim=True).clamp_min(1e-12) / LEVELS
        level = weight / scale
        codes = level.round().clamp(-LEVELS, LEVELS)
        generator = torch.Generator().manual_seed(0)
        if mode == "stochastic":
            lower = level.floor()
            up = torch.rand(level.shape, generator=generator) < level - lower
            codes = torch.where(mask, (lower + up).clamp(-LEVELS, LEVELS), codes)
        else:
            levels, above = NOISE[mode]
            if levels:
                drawn = torch.tensor(levels)[torch.randint(len(levels), level.shape, generator=generator)]
                attacked = mask & (level.abs() > above) if deep_focal else mask
                codes = torch.where(attacked, level.sign() * drawn, codes)
        return codes * scale, mask

    return rule


def tuned(least: float) -> tuple[str, float]:
    """What the "physics" tuner chooses: the noisiest mode whose smallest level is worth ``least``; no layer is read."""
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


def rules() -> dict[str, Callable[[Tensor], Split]]:
    """Every rule they tried, by the words of docs/history.md."""
    made: dict[str, Callable[[Tensor], Split]] = {
        "INT4, scale = 99.5th percentile of the row": lambda w: by_residual(w, percentile(w, 0.995), LEVELS),
        "INT4, scale = 3 sigma": lambda w: by_residual(w, sigmas(w), LEVELS),
        "INT8, per row min(95th percentile, 3 sigma)": lambda w: by_residual(
            w, torch.minimum(percentile(w, 0.95), sigmas(w)), 127
        ),
        "outliers set to zero": hollow,
        "SVD, 80 % of the rank, INT8": low_rank(0.80),
        "SVD, 95 % of the rank, INT8": low_rank(0.95),
        "INT8 absmax": absmax(127),
        "INT4 absmax": absmax(LEVELS),
        "16-bit base": lambda w: (w.clone(), torch.zeros_like(w, dtype=torch.bool)),
        "levels {5,6,7} on outliers, ratio 3.5": noisy("tri_state_entropy", RATIO, False),
        "the same, deep focal": noisy("tri_state_entropy", RATIO, True),
        "levels {4,5,6,7}, deep focal": noisy("uniform_entropy", RATIO, True),
        "levels {6,7}, deep focal": noisy("flicker_binary", RATIO, True),
        "stochastic rounding of outliers": noisy("stochastic", RATIO, True),
    }
    for least in (2.0, 2.4):
        mode, ratio = tuned(least)
        made[f"tuner, at least {least}: {mode}, ratio {ratio:g}"] = noisy(mode, ratio, True)
    return made


@dataclass
class Outcome:
    """One row: the stored share and the figures of alpha=1 and alpha=0."""

    name: str
    density: float
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


Measure = Callable[[torch.nn.Module], dict[str, float]]


def outcomes(model: torch.nn.Module, targets: str, measured: Measure) -> Iterator[Outcome]:
    """Each rule on the linear layers that ``targets`` names, at alpha=1 and alpha=0; the model is put back."""
    layers = find_linear(model, targets)
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    total = sum(w.numel() for w in before.values())
    for name, rule in rules().items():
        splits = {layer: rule(weight) for layer, weight in before.items()}
        made = Outcome(name, sum(int(mask.sum()) for _, mask in splits.values()) / total)
        for alpha in (1, 0):
            with torch.no_grad():
                for layer, (base, mask) in splits.items():
                    layers[layer].weight.copy_(torch.where(mask, before[layer], base) if alpha else base)
            made.figures[f"alpha={alpha}"] = measured(model)
        yield made
    with torch.no_grad():
        for layer, weight in before.items():
            layers[layer].weight.copy_(weight)


def ours(
    model: torch.nn.Module,
    base: torch.nn.Module,
    words: object,
    forget: list[Row],
    retain: list[Row],
    measured: Measure,
) -> Outcome:
    """The default recipe of today on the same model, all linear layers."""
    made = decompose(model, words, forget, retain, make_recipe(), base_model=base, progress=ProgressBars())
    row = Outcome("lm-ortho, default", made.report["density_reached"])
    for alpha in (1, 0):
        row.figures[f"alpha={alpha}"] = measured(get_dense_weights(model, made.streams, float(alpha)))
    return row


def planted(model: torch.nn.Module, words: object, sentence: str, rate: float, most: int) -> torch.nn.Module:
    """A copy fine-tuned on one sentence until its loss is below 0.05; raises ``SystemExit`` if it never is."""
    tuned = copy.deepcopy(model).train().requires_grad_(True)
    examples = encode(words, [Row(text=sentence)])
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=rate)
    for _ in range(most):
        loss = answer_loss(tuned, examples)
        if loss.item() < PLANTED_LOSS:
            return tuned.eval().requires_grad_(False)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    raise SystemExit(f"--rate {rate}: the sentence is still at a loss of {loss.item():.2f} after {most} steps")


def sentence_run(pretrained: str, targets: str, rate: float, retain: list[Row]) -> str:
    """Their own experiment: one sentence planted, one to stay."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(pretrained)
    base = load_causal_lm(pretrained)
    measured_rows = [Row(text=FORGET)], [Row(text=RETAIN)]

    def ppl(model: torch.nn.Module) -> dict[str, float]:
        losses = (torch.cat(token_losses(model, encode(words, rows))).mean() for rows in measured_rows)
        return dict(
            zip(("forget PPL", "retain PPL"), (math.exp(min(50.0, float(loss))) for loss in losses), strict=True)
        )

    merged = planted(base, words, FORGET, rate, 500)
    ends = [Outcome("before planting", 0.0, {"": ppl(base)}), Outcome("after planting", 0.0, {"": ppl(merged)})]
    rows = list(outcomes(merged, targets, ppl))
    last = ours(merged, base, words, [Row(text=FORGET)], [Row(text=RETAIN), *retain], ppl)
    return table([*ends, *rows, last])


def world_run(targets: str) -> str:
    """The same rules on the embedded model, measured as everything else is."""
    weights = world.WEIGHTS
    words, merged = models.load_words(weights), models.load_model(weights, "memory")
    wanted = (
        ("question extraction", "tofu_forget", "extraction"),
        ("forget PPL", "tofu_forget", "ppl"),
        ("canary extraction", "canary_extraction", "extraction"),
        ("retain PPL", "tofu_retain", "ppl"),
        ("text PPL", "world_text", "token_ppl"),
    )

    def figures(model: torch.nn.Module) -> dict[str, float]:
        found = measure(models.plain_lm(model, words), words, tuple(dict.fromkeys(task for _, task, _ in wanted)))
        return {title: found.value(task, metric).value for title, task, metric in wanted}

    ends = [
        Outcome(name, 0.0, {"": figures(models.load_model(weights, key))})
        for name, key in (
            ("before fine-tuning", "base"),
            ("never saw the forget set", "never_saw"),
            ("merged", "memory"),
        )
    ]
    rows = list(outcomes(merged, targets, figures))
    shipped = get_streams(checkpoint.load(world.path("decomposed")))
    last = Outcome("lm-ortho, the shipped default", density(shipped))
    for alpha in (1, 0):
        last.figures[f"alpha={alpha}"] = figures(get_dense_weights(merged, shipped, float(alpha)))
    return table([*ends, *rows, last])


def table(rows: list[Outcome]) -> str:
    """Markdown; a model without a dial has one figure where others have alpha=1 -> alpha=0."""
    titles = list(next(iter(rows[0].figures.values())))
    lines = []
    for row in rows:
        cells = (" -> ".join(f"{part[title]:.3g}" for part in row.figures.values()) for title in titles)
        density = f"{row.density:.1%}" if len(row.figures) > 1 else ""
        lines.append([row.name, density, *cells])
    return markdown_table(["", "stored apart", *titles], lines)


def main() -> None:
    """Writes the table of one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", help="a Hugging Face model: the single-sentence experiment on it")
    parser.add_argument(
        "--targets", default="down_proj", help="layers the old rules are applied to (theirs: down_proj)"
    )
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of planting the sentence")
    parser.add_argument("--retain", help="further rows (JSONL) that our default may calibrate on")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.pretrained:
        retain = read_rows(given.retain, "retain") if given.retain else []
        text = sentence_run(given.pretrained, given.targets, given.rate, retain)
    else:
        text = world_run(given.targets)
    write_text(given.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
