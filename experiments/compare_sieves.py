#!/usr/bin/env python
"""Compares every sieve with every edit on the embedded model; writes docs/sieves.md and its figure.

    python experiments/compare_sieves.py                  # all settings; finished ones are not run again
    python experiments/compare_sieves.py --only optimised --minutes 60
    python experiments/compare_sieves.py --earlier docs/sieves.json    # run none that this page has
    python experiments/compare_sieves.py --write          # write the page from the finished settings

Results are stored in the cache folder of lm-ortho (`compare/`), keyed by the code, the weights and the setting. Those
of an earlier page are of the code of that time: each row has the day on which it was computed.
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
from lm_ortho.baselines.kfac import compute_factors, keep_curvature_mass, select_late_feed_forward
from lm_ortho.checkpoint import cache
from lm_ortho.config import make_recipe
from lm_ortho.layer import find_linear, patch
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.pipeline.model_lattice import quantise
from lm_ortho.pipeline.workbench import Workbench
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.sieve import select_support
from lm_ortho.verdict import models
from lm_ortho.verdict.measurements import Measurement, measure
from lm_ortho.verdict.runner import ResultCache
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
    """One row of the table. ``group`` is what the method may read; ``density`` of a dense row is 1."""

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


def list_settings() -> Iterator[Setting]:
    """Yields the rows, the quick ones first."""
    yield Setting(BLIND, "-", "none", 0.0, "INT4")
    yield from (Setting(BLIND, "kfac", "dense", 1.0, f"late MLPs, kept mass {mass:g}") for mass in KEPT_MASS)
    for sieve in SIEVES:
        for edit in ("zero", "mean"):
            yield from (Setting(MERGED, sieve, edit, density) for density in DENSITIES)
    yield from (Setting(KNOWS_W0, "oracle", "w0", density) for density in DENSITIES)
    yield Setting(MERGED, "-", "dense", 1.0)
    yield Setting(KNOWS_W0, "-", "dense", 1.0)
    for density in (0.01, 0.05, 0.02, 0.005):
        yield from (Setting(group, DEFAULT, "optimised", density) for group in (MERGED, KNOWS_W0))
        if density in (0.01, 0.05):
            sieves = (sieve for sieve in SIEVES if sieve != DEFAULT)
            yield from (Setting(MERGED, sieve, "optimised", density) for sieve in sieves)


class Comparison:
    """Measures settings; workbenches, scores and curvature factors that several of them share are computed once."""

    def __init__(self, weights: Path, progress: Callable[..., None]) -> None:
        self.weights, self.progress = weights, progress
        self.recipe = make_recipe()
        self.tokenizer = models.load_tokenizer(weights)
        self._stack = ExitStack()
        self._workbenches = dict[bool, Workbench]()
        self._scores = dict[tuple[bool, str], dict[str, Tensor]]()

    def close(self) -> None:
        self._stack.close()

    def get_workbench(self, knows_w0: bool) -> Workbench:
        if knows_w0 not in self._workbenches:
            workbench = Workbench(
                models.load_model(self.weights, "memory"),
                self.tokenizer,
                corpus.make_forget_rows(),
                corpus.make_calibration_rows(),
                recipe=self.recipe,
                base_model=models.load_model(self.weights, "base") if knows_w0 else None,
                progress=self.progress,
            )
            self._workbenches[knows_w0] = self._stack.enter_context(workbench)
        return self._workbenches[knows_w0]

    def measure_setting(self, setting: Setting) -> dict[str, Any]:
        """Measures the setting at alpha=0."""
        from lm_ortho.harness.model import LibOrthoLM

        start_time = time.perf_counter()
        streams = self.make_streams(setting)
        seconds = round(time.perf_counter() - start_time, 1)
        model = models.load_model(self.weights, "memory")
        patch(model, streams)
        lm = LibOrthoLM(pretrained=model, tokenizer=self.tokenizer, alpha=0)
        measurement = measure(lm, self.tokenizer, TASKS).to_json()
        return {**measurement, "setting": vars(setting), "seconds": seconds, "made": datetime.date.today().isoformat()}

    def make_streams(self, setting: Setting) -> dict[str, Any]:
        if setting.edit == "dense":
            kfac_mass = float(setting.note.split()[-1]) if setting.sieve == "kfac" else None
            return self.project_model(self.edit_dense(setting) if kfac_mass is None else self.edit_kfac(kfac_mass))
        workbench = self.get_workbench(setting.group == KNOWS_W0)
        if setting.edit == "none":
            return workbench.make_streams(workbench.plain_lattice.codes)
        key = (setting.group == KNOWS_W0, setting.sieve)
        if key not in self._scores:
            self._scores[key] = workbench.score_weights(setting.sieve, self.recipe.steps)
        support = select_support(self._scores[key], setting.density)
        lattice = workbench.project(support)
        codes = workbench.edit_codes(setting.edit, lattice, support, steps=self.recipe.steps)
        return workbench.make_streams(codes, support)

    def project_model(self, model: torch.nn.Module) -> dict[str, Any]:
        """Projects a model whose weights were all edited onto its own lattice; the streams have no support."""
        return quantise(model, self.get_workbench(False).sets.retain, self.recipe)

    def edit_dense(self, setting: Setting) -> torch.nn.Module:
        """Minimises the objective of the default recipe over all weights."""
        # 1. Adam with a step size in lattice steps of each layer.
        workbench = self.get_workbench(setting.group == KNOWS_W0)
        objective = workbench.objective
        objective.restart(self.recipe.seed)
        groups = [
            {"params": [layer.weight], "unit": workbench.step_units[name]} for name, layer in workbench.layers.items()
        ]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-10)
        for step in range(1, DENSE_STEPS + 1):
            gradients, forget_loss, retain_loss = objective.gradients()
            warm_up, decay = min(1, step / 10), max(0.05, 1 - step / DENSE_STEPS)
            for group, gradient in zip(optimiser.param_groups, gradients.values(), strict=True):
                group["params"][0].grad = gradient
                group["lr"] = DENSE_RATE * group["unit"] * warm_up * decay
            optimiser.step()
            self.progress("dense", step, DENSE_STEPS, f"forget {forget_loss:.3f} retain {retain_loss:.4f}")
        # 2. Copy the edited model and restore the weights of the workbench.
        edited_model = copy.deepcopy(workbench.model)
        with torch.no_grad():
            for name, layer in workbench.layers.items():
                layer.weight.copy_(workbench.weights[name])
                layer.weight.grad = None
        return edited_model

    def edit_kfac(self, mass: float) -> torch.nn.Module:
        """Keeps of each matrix the top ``mass`` of its K-FAC curvature on general text.

        This edits the MLPs of the later half of the layers, as the paper edits late MLPs: on every matrix, a kept mass
        of .3 to .9 destroyed the model.
        """
        model = models.load_model(self.weights, "memory")
        layers = find_linear(model)
        inputs, outputs = self._factors
        for name in select_late_feed_forward(list(layers), 0.5):
            weight = layers[name].weight
            weight.data.copy_(keep_curvature_mass(weight.detach(), outputs[name], inputs[name], mass))
        return model

    @cached_property
    def _factors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The factors of the curvature of every layer on the calibration set."""
        model = models.load_model(self.weights, "memory")
        return compute_factors(model, find_linear(model), self.get_workbench(False).sets.retain)


COLUMNS = (
    ("question extraction", "tofu_forget", "extraction"),
    ("held-out phrasing", "tofu_forget_paraphrased", "extraction"),
    ("question secret PPL", "tofu_forget", "secret_ppl"),
    ("canary extraction", "canary_extraction", "extraction"),
    ("canary secret PPL", "canary_extraction", "secret_ppl"),
    ("left-out retain PPL / INT4", "tofu_retain", "ppl"),
    ("text PPL / INT4", "world_text", "token_ppl"),
)


Results = dict[Setting, dict[str, Any]]
"""The measurement of each setting as JSON."""
Controls = dict[str, dict[str, Any]]
"""The measurement of each embedded model (the memory and the retain-only models) as JSON."""


def compute_distance(measurement: Measurement, retain_only: Measurement) -> float:
    """Computes the distance to a retain-only model: the mean |log ratio| of the secret perplexities."""
    tasks = ("tofu_forget", "canary_extraction")
    ratios = [measurement.value(t, "secret_ppl").value / retain_only.value(t, "secret_ppl").value for t in tasks]
    return sum(abs(math.log(ratio)) for ratio in ratios) / len(tasks)


def make_table(results: Results, controls: Controls) -> str:
    """Makes the table of docs/sieves.md."""
    retain_only = Measurement.from_json(controls["never_saw"])
    plain = next((Measurement.from_json(result) for setting, result in results.items() if setting.edit == "none"), None)
    rows = list[list[str]]()

    def add_row(head: list[str], result: dict[str, Any]) -> None:
        measurement, line = Measurement.from_json(result), head
        for title, task, metric in COLUMNS:
            denominator = plain.value(task, metric).value if "INT4" in title and plain else 1.0
            value, low, high = (part / denominator for part in measurement.value(task, metric))
            line.append(f"{value:.3g} [{low:.3g}, {high:.3g}]")
        rows.append([*line, f"{compute_distance(measurement, retain_only):.3f}", result.get("made", "")])

    for name, result in controls.items():
        add_row([name, "", "", ""], result)
    for setting in sorted(results, key=lambda s: (s.group, s.edit != "none", s.edit, s.sieve, s.density)):
        sieve = f"{setting.sieve} {setting.note}".strip()
        add_row([setting.group, sieve, setting.edit, f"{setting.density:.1%}"], results[setting])
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


def list_missing(results: Results, settings: list[Setting]) -> str:
    """Lists the settings without a row."""
    names = [setting.name for setting in settings if setting not in results]
    return f"Not made: {'; '.join(names)}." if names else "Every setting is there."


def compare_with_default(results: Results, controls: Controls) -> str:
    """Lists the rows that are better than the default of the same group and density on both sides."""
    retain_only = Measurement.from_json(controls["never_saw"])
    measurements = {setting: Measurement.from_json(result) for setting, result in results.items()}
    distances = {setting: compute_distance(m, retain_only) for setting, m in measurements.items()}
    costs = {setting: m.value("tofu_retain", "ppl").value for setting, m in measurements.items()}
    lines = list[str]()
    for default in (s for s in results if s.sieve == DEFAULT and s.edit == "optimised"):
        rivals = [s for s in results if (s.group, s.density) == (default.group, default.density)]
        better = sorted(s.sieve for s in rivals if distances[s] < distances[default] and costs[s] < costs[default])
        lines += [f"{default.group}, {default.density:.1%}: {', '.join(better)}"] if better else []
    text = "; ".join(sorted(lines)) or "nowhere"
    return f"Nearer to the reference than the default *and* cheaper, at the same density in the same group: {text}."


def draw_figure(results: Results, controls: Controls, path: Path) -> None:
    """Draws forgetting against retention, one mark per setting."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "lm-ortho"
    retain_only = Measurement.from_json(controls["never_saw"])
    figure, axes = pyplot.subplots(figsize=(8, 6))
    marks = {"none": "*", "zero": "v", "mean": "^", "optimised": "o", "w0": "s", "dense": "D"}
    colours = {sieve: f"C{i}" for i, sieve in enumerate((*SIEVES, "oracle", "kfac"))}
    for setting, result in results.items():
        measurement = Measurement.from_json(result)
        axes.scatter(
            compute_distance(measurement, retain_only),
            measurement.value("tofu_retain", "ppl").value,
            marker=marks[setting.edit],
            color=colours.get(setting.sieve, "black"),
            facecolors="none" if setting.group == MERGED else None,
            s=20 + 1500 * min(setting.density, 0.05),
            label=f"{setting.sieve}, {setting.edit}",
        )
    axes.axhline(retain_only.value("tofu_retain", "ppl").value, color="grey", linewidth=0.5)
    axes.set(xscale="symlog", yscale="log", ylabel="answer perplexity, left-out retain authors")
    axes.set_xlabel("distance to the model that never saw the forget set, |log PPL ratio| (0: like it)")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


HEAD = """# Sieves and edits beside each other

Made by `python experiments/compare_sieves.py` on {date} ({versions}): the embedded model and world, INT4 in
groups of 64, one seed, {steps} steps of the optimised edit, all documents of the tasks. {finished} of {all} settings
are finished; the script resumes where it stopped. *made* is the day of a row, whose code was that of the day.

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
    """Measures the missing settings, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further setting after this time")
    parser.add_argument("--only", default="", help="run only settings whose name contains this text")
    parser.add_argument("--earlier", type=Path, help="sieves.json of an earlier run, whose rows are used unchanged")
    parser.add_argument("--write", action="store_true", help="write the page from the finished settings and run none")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of sieves.md, sieves.json, sieves.svg")
    arguments = parser.parse_args()
    weights, deadline = world.WEIGHTS, time.monotonic() + 60 * arguments.minutes
    stored_results = ResultCache(cache.cache_dir() / "compare", weights)
    comparison = Comparison(weights, ProgressBars())
    # 1. Measure the embedded models.
    controls: Controls = {}
    for name in ("memory", "never_saw", "never_saw_2"):
        controls[name] = stored_results.get(name, partial(measure_model, weights, comparison.tokenizer, name))
    # 2. Measure every setting, unless an earlier run has it or the time is over.
    settings, results = list(list_settings()), Results()
    earlier_results = read_results(arguments.earlier) if arguments.earlier else {}
    for number, setting in enumerate(settings, 1):
        if not stored_results.has("setting", **vars(setting)):
            if setting in earlier_results:
                results[setting] = earlier_results[setting]
                continue
            if arguments.write or arguments.only not in setting.name or time.monotonic() > deadline:
                continue
        print(f"{number} of {len(settings)}: {setting.name}", flush=True)
        compute = partial(comparison.measure_setting, setting)
        results[setting] = stored_results.get("setting", compute, **vars(setting))
    comparison.close()
    # 3. Write the page.
    write(arguments.out, results, controls, settings)


def read_results(path: Path) -> Results:
    """Reads the rows of an earlier sieves.json, by setting."""
    results = json.loads(path.read_text(encoding="utf-8"))
    return {Setting(**result["setting"]): {"samples": {}, "groups": {}, **result} for result in results}


def measure_model(weights: Path, tokenizer: Any, name: str) -> dict[str, Any]:
    lm = models.make_hf_lm(models.load_model(weights, name), tokenizer)
    return measure(lm, tokenizer, TASKS).to_json()


def write(out: Path, results: Results, controls: Controls, settings: list[Setting]) -> None:
    """Writes sieves.md, sieves.json and sieves.svg."""
    text = HEAD.format(
        date=datetime.date.today().isoformat(),
        versions=versions(),
        steps=make_recipe().steps,
        finished=len(results),
        all=len(settings),
        table=make_table(results, controls),
        left=list_missing(results, settings),
        better=compare_with_default(results, controls),
    )
    draw_figure(results, controls, out / "sieves.svg")
    keys = ("setting", "seconds", "made", "values")
    records = [{key: result[key] for key in keys} for result in results.values()]
    write_text(out / "sieves.json", json.dumps(records, indent=1) + "\n")
    write_text(out / "sieves.md", text)
    print(f"{len(results)} of {len(settings)} settings in {out / 'sieves.md'}")


if __name__ == "__main__":
    main()
