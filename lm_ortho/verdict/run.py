"""The verdict: a fresh decomposition of the embedded model against INT4 and the never-saw-it references."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lm_ortho
from lm_ortho import reference
from lm_ortho.checkpoint import cache
from lm_ortho.decompose import decompose
from lm_ortho.harness import build
from lm_ortho.harness.progress import Bars
from lm_ortho.implant import Notify, load_causal_lm, merge_adapter
from lm_ortho.kernels import calls
from lm_ortho.layer import patch
from lm_ortho.plugin.bridges import tasks_dir
from lm_ortho.settings import make_recipe
from lm_ortho.verdict.checks import Check, forgetting_checks, intact_checks, memory_checks, verdict_of
from lm_ortho.verdict.measure import MEMORY_TASKS, REASONING_TASKS, Measurement, measure

QUICK_LIMIT = 200
"""Documents per memory task with ``--quick``; reasoning keeps all, its bar needs them."""


@dataclass(frozen=True)
class Outcome:
    """PASS, FAIL or INVALID with every check; ``tables`` holds the measurements by model for printing."""

    verdict: str
    checks: list[Check]
    tables: dict[str, Measurement]

    def as_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}


class Cells:
    """Finished measurements on disk, so that an interrupted run goes on where it stopped.

    The key holds the version, the code of the package, the embedded weights and everything that was asked for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._identity = _identity()

    def get(self, name: str, make: Callable[[], dict[str, Any]], **wanted: Any) -> dict[str, Any]:
        """The finished cell, or what ``make`` gives, kept for the next time."""
        content = json.dumps({"name": name, "identity": self._identity, **wanted}, sort_keys=True)
        path = self.directory / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(made))
        partial.replace(path)
        return made


def _identity() -> str:
    """Hash of the package's own code and of the embedded weights: a change of either makes cells stale."""
    digest = hashlib.sha256(f"{lm_ortho.__version__} {torch.__version__}".encode())
    root = Path(lm_ortho.__file__).parent
    kernels = Path(inspect.getfile(calls)).parent
    code = [*root.rglob("*.py"), *kernels.rglob("*.py"), *(p for p in tasks_dir().rglob("*") if p.suffix != ".md")]
    for path in sorted({*code, *reference.WEIGHTS.rglob("*.safetensors")}):
        if path.is_file() and not {"cli", "plugin", "decomposed"} & set(path.parts):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def run(
    modes: Sequence[str],
    seeds: Sequence[int],
    quick: bool,
    notify: Notify | None = None,
    say: Callable[[str], None] = print,
    directory: Path | None = None,
) -> Outcome:
    """Measures every (mode, seed) cell and judges them; ``modes`` are values of ``base``."""
    notify, limit = notify or Bars(), QUICK_LIMIT if quick else None
    cells = Cells(directory or cache.cache_dir() / "verdict")
    tables: dict[str, Measurement] = {}
    for name in ("never_saw", "never_saw_2"):
        say(f"measuring {name}")
        made = cells.get(name, lambda name=name: _measure_reference(name, limit), limit=limit)  # type: ignore[misc]
        tables[name] = Measurement.from_json(made)
    control = forgetting_checks(tables["never_saw_2"], tables["never_saw"], "-", 0, "second reference")
    memory: list[Check] = []
    rest: list[Check] = []
    for mode in modes:
        for seed in seeds:
            say(f"decomposing and measuring base={mode} seed={seed}")
            began = time.perf_counter()
            made = cells.get(
                "decomposed",
                lambda mode=mode, seed=seed: _measure_decomposition(mode, seed, limit, notify, say),  # type: ignore[misc]
                base=mode,
                seed=seed,
                limit=limit,
            )
            say(f"  done in {time.perf_counter() - began:.0f} s")
            parts = {part: Measurement.from_json(made[part]) for part in ("alpha=1", "alpha=0", "int4")}
            tables |= {f"{part} base={mode} seed={seed}": m for part, m in parts.items()}
            memory += memory_checks(parts["alpha=1"], mode, seed)
            rest += forgetting_checks(parts["alpha=0"], tables["never_saw"], mode, seed)
            rest += intact_checks(parts["alpha=0"], parts["int4"], mode, seed)
    return Outcome(verdict_of(memory, control, rest), [*memory, *control, *rest], tables)


def _measure_reference(name: str, limit: int | None) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    model = merge_adapter(load_causal_lm(reference.path("base")), reference.path(name))
    tokenizer = build.load_tokenizer(build.resolve(build.Order(fresh=True)))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64, softmax_dtype="float32")
    return measure(lm, tokenizer, MEMORY_TASKS, limit).as_json()


def _measure_decomposition(
    mode: str, seed: int, limit: int | None, notify: Notify, say: Callable[[str], None]
) -> dict[str, Any]:
    from lm_ortho.harness.model import LibOrthoLM

    recipe = {} if seed == make_recipe().seed else {"seed": seed}
    source = build.resolve(build.Order(base=mode, fresh=True, recipe=recipe))
    model, base_model = build.load_models(source)
    tokenizer = build.load_tokenizer(source)
    forget, retain = build.calibration_sets(source)
    made = decompose(
        model,
        tokenizer,
        forget,
        retain,
        source.recipe,
        base_model=base_model if mode != "none" else None,
        notify=notify,
    )
    say(f"  target {made.report['target']}, {made.report['seconds']} s")
    plain = copy.deepcopy(model)
    patch(plain, made.plain)
    patch(model, made.streams)
    result: dict[str, Any] = {"report": made.report}
    for name, decomposed, alpha in (("alpha=1", model, 1.0), ("alpha=0", model, 0.0), ("int4", plain, 0.0)):
        say(f"  measuring {name}")
        lm = LibOrthoLM(pretrained=decomposed, tokenizer=tokenizer, alpha=alpha)
        part = measure(lm, tokenizer, MEMORY_TASKS, limit)
        if name != "alpha=1":
            part = _joined(part, measure(lm, tokenizer, REASONING_TASKS))
        result[name] = part.as_json()
    return result


def _joined(first: Measurement, second: Measurement) -> Measurement:
    return Measurement(first.values | second.values, first.hits | second.hits, first.seconds + second.seconds)
