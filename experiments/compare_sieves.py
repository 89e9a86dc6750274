#!/usr/bin/env python
"""Every sieve with every edit beside each other on the embedded model; makes docs/sieves.md and its picture.

    python experiments/compare_sieves.py                  # all cells; finished ones are kept and not made again
    python experiments/compare_sieves.py --only optimised --minutes 60
    python experiments/compare_sieves.py --earlier docs/sieves.json    # make none that this page has
    python experiments/compare_sieves.py --write          # the page from the cells that are there

Cells are kept in the cache folder of lm-ortho (`compare/`), keyed by the code, the weights and the setting. Those of an
earlier page are of the code of that time: each row says the day on which it was made.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_ortho import world
from lm_ortho.baselines.kfac import factors, keep_mass, late_feed_forward
from lm_ortho.calibration.activations import input_moments
from lm_ortho.checkpoint import cache
from lm_ortho.config import make_recipe
from lm_ortho.layer import find_linear, patch
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.pipeline.workbench import Workbench, make_streams, projected
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.sieve import select_support
from lm_ortho.verdict import models
from lm_ortho.verdict.measurements import Measurement, measure
from lm_ortho.verdict.runner import Cells
from lm_ortho.world import corpus

TASKS = ("tofu_forget", "tofu_forget_paraphrased", "canary_extraction", "tofu_retain", "world_text")
DENSITIES = (0.005, 0.01, 0.02, 0.05)
SIEVES = ("random", "magnitude", "wanda", "residual", "hessian", "obs", "fisher_ratio", "attribution")
DEFAULT = "attribution"
KEPT_MASS = (0.3, 0.5, 0.7, 0.9)
DENSE_STEPS, DENSE_RATE = 200, 0.06
"""Steps of dense unlearning and its rate in lattice steps; more steps did not lower the retain loss further."""
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Setting:
    """One row of the table. ``group`` says what it may read; ``density`` of a dense row is 1."""

    group: str
    sieve: str
    edit: str
    density: float
    note: str = ""

    @property
    def name(self) -> str:
        return " ".join(
            str(part) for part in (self.group, self.sieve, self.edit, self.density, self.note) if part != ""
        )


MERGED, KNOWS_W0, BLIND = "merged weights", "also W0", "no forget set"


def settings() -> Iterator[Setting]:
    """The rows, quick ones first."""
    yield Setting(BLIND, "-", "none", 0.0, "INT4")
    yield from (Setting(BLIND, "kfac", "dense", 1.0, f"late MLPs, kept mass {kept:g}") for kept in KEPT_MASS)
    for sieve in SIEVES:
        for edit in ("zero", "mean"):
            yield from (Setting(MERGED, sieve, edit, density) for density in DENSITIES)
    yield from (Setting(KNOWS_W0, "oracle", "w0", density) for density in DENSITIES)
    yield Setting(MERGED, "-", "dense", 1.0)
    yield Setting(KNOWS_W0, "-", "dense", 1.0)
    for density in (0.01, 0.05, 0.02, 0.005):
        yield from (Setting(group, DEFAULT, "optimised", density) for group in (MERGED, KNOWS_W0))
        if density in (0.01, 0.05):
            others = (sieve for sieve in SIEVES if sieve != DEFAULT)
            yield from (Setting(MERGED, sieve, "optimised", density) for sieve in others)


class Comparison:
    """Makes cells; what several of them share is prepared once."""

    def __init__(self, weights: Path, progress: Callable[..., None]) -> None:
        self.weights, self.progress = weights, progress
        self.recipe = make_recipe()
        self.tokenizer = models.load_words(weights)
        self._stack = ExitStack()
        self._benches = dict[bool, Workbench]()
        self._scores = dict[tuple[bool, str], dict[str, Tensor]]()

    def close(self) -> None:
        self._stack.close()

    def bench(self, knows_w0: bool) -> Workbench:
        if knows_w0 not in self._benches:
            sets = corpus.forget_rows(), corpus.calibration_rows()
            base = models.load_model(self.weights, "base") if knows_w0 else None
            made = Workbench(
                models.load_model(self.weights, "memory"), self.tokenizer, *sets, self.recipe,
                base_model=base, progress=self.progress,
            )  # fmt: skip
            self._benches[knows_w0] = self._stack.enter_context(made)
        return self._benches[knows_w0]

    def measured(self, setting: Setting) -> dict[str, Any]:
        """Measures the setting at alpha=0."""
        from lm_ortho.harness.model import LibOrthoLM

        began = time.perf_counter()
        streams = self.streams(setting)
        seconds = round(time.perf_counter() - began, 1)
        model = models.load_model(self.weights, "memory")
        patch(model, streams)
        lm = LibOrthoLM(pretrained=model, tokenizer=self.tokenizer, alpha=0)
        found = measure(lm, self.tokenizer, TASKS).as_json()
        return {**found, "setting": vars(setting), "seconds": seconds, "made": datetime.date.today().isoformat()}

    def streams(self, setting: Setting) -> dict[str, Any]:
        if setting.edit == "dense":
            edited = self.kfac(float(setting.note.split()[-1])) if setting.sieve == "kfac" else self.dense(setting)
            return self.rounded(edited)
        bench = self.bench(setting.group == KNOWS_W0)
        if setting.edit == "none":
            return bench.streams(bench.codes, None)
        key = (setting.group == KNOWS_W0, setting.sieve)
        if key not in self._scores:
            self._scores[key] = bench.scores(setting.sieve, self.recipe.steps)
        support = select_support(self._scores[key], setting.density)
        return bench.streams(bench.edited(setting.edit, support, self.recipe.steps), support)

    def rounded(self, model: torch.nn.Module) -> dict[str, Any]:
        """Streams of a model all of whose weights were edited: its own lattice and projection, no support."""
        layers = find_linear(model)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        moments = input_moments(model, layers, self.bench(False).retain)
        scales, codes = projected(weights, moments, self.recipe)
        return make_streams(layers, weights, codes, scales, None, self.recipe)

    def dense(self, setting: Setting) -> torch.nn.Module:
        """All weights go down the objective of the default recipe."""
        bench = self.bench(setting.group == KNOWS_W0)
        objective = bench.objective()
        objective.restart(self.recipe.seed)
        trained = [{"params": [layer.weight], "unit": bench.unit[name]} for name, layer in bench.layers.items()]
        optimiser = torch.optim.Adam(trained, betas=(0.9, 0.98), eps=1e-10)
        for step in range(1, DENSE_STEPS + 1):
            gradients, lost, kept = objective.gradients()
            warm, left = min(1, step / 10), max(0.05, 1 - step / DENSE_STEPS)
            for group, gradient in zip(optimiser.param_groups, gradients.values(), strict=True):
                group["params"][0].grad = gradient
                group["lr"] = DENSE_RATE * group["unit"] * warm * left
            optimiser.step()
            self.progress("dense", step, DENSE_STEPS, f"forget {lost:.3f} retain {kept:.4f}")
        edited = copy.deepcopy(bench.model)
        with torch.no_grad():
            for name, layer in bench.layers.items():
                layer.weight.copy_(bench.weights[name])
                layer.weight.grad = None
        return edited

    def kfac(self, kept: float) -> torch.nn.Module:
        """Of the mass of the K-FAC curvature of each matrix on general text the top ``kept`` stays.

        Edited are the MLPs of the later half of the layers, as late MLPs are in the paper: with every matrix a kept
        mass of .3 to .9 destroyed the model.
        """
        model = models.load_model(self.weights, "memory")
        layers = find_linear(model)
        inputs, outputs = self._factors
        for name in late_feed_forward(list(layers), 0.5):
            weight = layers[name].weight
            weight.data.copy_(keep_mass(weight.detach(), outputs[name], inputs[name], kept))
        return model

    @cached_property
    def _factors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The factors of the curvature of every layer on the calibration."""
        model = models.load_model(self.weights, "memory")
        return factors(model, find_linear(model), self.bench(False).retain)


COLUMNS = (
    ("question extraction", "tofu_forget", "extraction"),
    ("held-out phrasing", "tofu_forget_paraphrased", "extraction"),
    ("question secret PPL", "tofu_forget", "secret_ppl"),
    ("canary extraction", "canary_extraction", "extraction"),
    ("canary secret PPL", "canary_extraction", "secret_ppl"),
    ("left-out retain PPL / INT4", "tofu_retain", "ppl"),
    ("text PPL / INT4", "world_text", "token_ppl"),
)


def distance(found: Measurement, never_saw: Measurement) -> float:
    """How far from a model that never saw the forget set: mean |log ratio| of the secret perplexities."""
    tasks = ("tofu_forget", "canary_extraction")
    return sum(
        abs(math.log(found.value(t, "secret_ppl").value / never_saw.value(t, "secret_ppl").value)) for t in tasks
    ) / len(tasks)


def page(cells: dict[Setting, dict[str, Any]], references: dict[str, dict[str, Any]]) -> str:
    """docs/sieves.md."""
    never_saw = Measurement.from_json(references["never_saw"])
    plain = next((Measurement.from_json(cell) for setting, cell in cells.items() if setting.edit == "none"), None)
    rows = list[list[str]]()

    def row(head: list[str], cell: dict[str, Any]) -> None:
        found, line = Measurement.from_json(cell), head
        for title, task, metric in COLUMNS:
            over = plain.value(task, metric).value if "INT4" in title and plain else 1.0
            value, low, high = (part / over for part in found.value(task, metric))
            line.append(f"{value:.3g} [{low:.3g}, {high:.3g}]")
        rows.append([*line, f"{distance(found, never_saw):.3f}", cell.get("made", "")])

    for name, cell in references.items():
        row([name, "", "", ""], cell)
    for setting in sorted(cells, key=lambda s: (s.group, s.edit != "none", s.edit, s.sieve, s.density)):
        sieve = f"{setting.sieve} {setting.note}".strip()
        row([setting.group, sieve, setting.edit, f"{setting.density:.1%}"], cells[setting])
    titles = [
        "reads",
        "sieve",
        "edit",
        "density",
        *(title for title, _, _ in COLUMNS),
        "distance to never-saw-it",
        "made",
    ]
    return markdown_table(titles, rows)


def missing(cells: dict[Setting, dict[str, Any]], every: list[Setting]) -> str:
    """Which settings have no row."""
    left = [setting.name for setting in every if setting not in cells]
    return f"Not made: {'; '.join(left)}." if left else "Every setting is there."


def beaten(cells: dict[Setting, dict[str, Any]], references: dict[str, dict[str, Any]]) -> str:
    """Where another row of the same group and density is better than the default's on both sides."""
    never_saw = Measurement.from_json(references["never_saw"])
    found = {setting: Measurement.from_json(cell) for setting, cell in cells.items()}
    far = {setting: distance(measured, never_saw) for setting, measured in found.items()}
    cost = {setting: measured.value("tofu_retain", "ppl").value for setting, measured in found.items()}
    lines = list[str]()
    for default in (s for s in cells if s.sieve == DEFAULT and s.edit == "optimised"):
        rivals = [s for s in cells if (s.group, s.density) == (default.group, default.density)]
        better = sorted(s.sieve for s in rivals if far[s] < far[default] and cost[s] < cost[default])
        lines += [f"{default.group}, {default.density:.1%}: {', '.join(better)}"] if better else []
    told = "; ".join(sorted(lines)) or "nowhere"
    return f"Nearer to the reference than the default *and* cheaper, at the same density in the same group: {told}."


def picture(cells: dict[Setting, dict[str, Any]], references: dict[str, dict[str, Any]], path: Path) -> None:
    """Forget against retain, one mark per cell."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "lm-ortho"
    never_saw = Measurement.from_json(references["never_saw"])
    figure, axes = pyplot.subplots(figsize=(8, 6))
    marks = {"none": "*", "zero": "v", "mean": "^", "optimised": "o", "w0": "s", "dense": "D"}
    colours = {sieve: f"C{i}" for i, sieve in enumerate((*SIEVES, "oracle", "kfac"))}
    for setting, cell in cells.items():
        found = Measurement.from_json(cell)
        axes.scatter(
            distance(found, never_saw), found.value("tofu_retain", "ppl").value,
            marker=marks[setting.edit], color=colours.get(setting.sieve, "black"),
            facecolors="none" if setting.group == MERGED else None, s=20 + 1500 * min(setting.density, 0.05),
            label=f"{setting.sieve}, {setting.edit}",
        )  # fmt: skip
    axes.axhline(never_saw.value("tofu_retain", "ppl").value, color="grey", linewidth=0.5)
    axes.set(xscale="symlog", yscale="log", ylabel="answer perplexity, left-out retain authors")
    axes.set_xlabel("distance to the model that never saw the forget set, |log PPL ratio| (0: like it)")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


HEAD = """# Sieves and edits beside each other

Made by `python experiments/compare_sieves.py` on {date} ({versions}): the embedded model and world, INT4 in
groups of 64, one seed, {steps} steps of the optimised edit, all documents of the tasks. {finished} of {all} settings
are finished; the script goes on where it stopped. *made* is the day of a row, whose code was that of the day.

*also W0* reads the model before fine-tuning; *merged weights* reads nothing but the merged model and the rows; *no
forget set* does not even read the forget rows. What is measured is alpha=0. Brackets are 95 % intervals over authors,
canaries or documents. The distance is the mean over questions and canaries of |log(secret PPL / that of the first
reference)|: 0 is *like a model that never saw it*, from both sides. *dense* rows edit all weights and are rounded to
INT4 afterwards; there is no way back to alpha=1 from them but a second dense model. Edit *none* is the same for every
sieve: at alpha=0 the base stream is plain INT4.

How to read it: with an edit that does not look at the forget set (*zero*, *mean*) a sieve forgets about as much as it
destroys. The optimised edit does much by itself, on any support; at 1 % the sieve decides how much of it fits, at 5 %
all of it fits on any support ([decision 23](decisions/0023-any-support-at-five-percent.md)). All weights free (*dense*)
come nearer to the reference than 1 % of them from the merged weights alone, and cost the left-out authors more.

![forget against retain](sieves.svg)

{better}

{table}

{left}
"""


def main() -> None:
    """Makes what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further cell after so long")
    parser.add_argument("--only", default="", help="settings whose name holds this text")
    parser.add_argument("--earlier", type=Path, help="sieves.json of an earlier run, whose rows are taken as they are")
    parser.add_argument("--write", action="store_true", help="make no cell, write the page from those that are there")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of sieves.md, sieves.json, sieves.svg")
    given = parser.parse_args()
    weights, until = world.WEIGHTS, time.monotonic() + 60 * given.minutes
    cells, bars = Cells(cache.cache_dir() / "compare", weights), ProgressBars()
    comparison = Comparison(weights, bars)
    measure_reference = partial(measured_reference, weights, comparison.tokenizer)
    references = {n: cells.get(n, partial(measure_reference, n)) for n in ("memory", "never_saw", "never_saw_2")}
    every, finished = list(settings()), dict[Setting, dict[str, Any]]()
    before = earlier_cells(given.earlier) if given.earlier else {}
    for number, setting in enumerate(every, 1):
        wanted = vars(setting)
        if not cells.has("setting", **wanted):
            if setting in before:
                finished[setting] = before[setting]
                continue
            if given.write or given.only not in setting.name or time.monotonic() > until:
                continue
        print(f"{number} of {len(every)}: {setting.name}", flush=True)
        finished[setting] = cells.get("setting", partial(comparison.measured, setting), **wanted)
    comparison.close()
    write(given.out, finished, references, every)


def earlier_cells(path: Path) -> dict[Setting, dict[str, Any]]:
    """The rows of an earlier sieves.json by setting."""
    cells = json.loads(path.read_text(encoding="utf-8"))
    return {Setting(**cell["setting"]): {"samples": {}, "groups": {}, **cell} for cell in cells}


def measured_reference(weights: Path, tokenizer: Any, name: str) -> dict[str, Any]:
    lm = models.plain_lm(models.load_model(weights, name), tokenizer)
    return measure(lm, tokenizer, TASKS).as_json()


def write(
    out: Path, cells: dict[Setting, dict[str, Any]], references: dict[str, dict[str, Any]], every: list[Setting]
) -> None:
    text = HEAD.format(
        date=datetime.date.today().isoformat(), versions=versions(), steps=make_recipe().steps,
        finished=len(cells), all=len(every), table=page(cells, references), left=missing(cells, every),
        better=beaten(cells, references),
    )  # fmt: skip
    picture(cells, references, out / "sieves.svg")
    shown = ("setting", "seconds", "made", "values")
    kept = [{key: cell[key] for key in shown} for cell in cells.values()]
    write_text(out / "sieves.json", json.dumps(kept, indent=1) + "\n")
    write_text(out / "sieves.md", text)
    print(f"{len(cells)} of {len(every)} settings in {out / 'sieves.md'}")


if __name__ == "__main__":
    main()
