"""The verdict: a fresh decomposition of the embedded model against INT4 and the never-saw-it references."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_ortho import checkpoint, world
from lm_ortho.checkpoint import cache
from lm_ortho.config import make_recipe
from lm_ortho.layer import patch, unpatch
from lm_ortho.pipeline.code_hash import DECOMPOSITION, EVALUATION, code_hash, versions
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime.progress import ProgressBars, ProgressCallback
from lm_ortho.verdict import models
from lm_ortho.verdict.checks import Check, forgetting_checks, intact_checks, memory_checks, verdict_of
from lm_ortho.verdict.measurements import MEMORY_TASKS, REASONING_TASKS, Measurement, measure
from lm_ortho.verdict.relearning import relearning
from lm_ortho.world import corpus

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
    """Finished measurements and decompositions on disk, so that an interrupted run goes on where it stopped.

    The key holds the versions, the code that made it, the weights and everything that was asked for.
    """

    def __init__(self, directory: Path, weights: Path = world.WEIGHTS) -> None:
        self.directory = directory
        self._identity = _identity(weights, _measurement_code())
        self._identity_of_streams = _identity(weights, code_hash(*DECOMPOSITION))

    def get(self, name: str, make: Callable[[], dict[str, Any]], **wanted: Any) -> dict[str, Any]:
        """The finished cell, or what ``make`` gives, kept for the next time."""
        path = self._path(name, self._identity, wanted).with_suffix(".json")
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        unfinished.write_text(json.dumps(made))
        unfinished.replace(path)
        return made

    def has(self, name: str, **wanted: Any) -> bool:
        """Whether the cell is finished."""
        return self._path(name, self._identity, wanted).with_suffix(".json").is_file()

    def folder(self, name: str, make: Callable[[Path], None], **wanted: Any) -> Path:
        """The finished folder, or one that ``make`` fills; it outlives changes of code that only measures."""
        path = self._path(name, self._identity_of_streams, wanted)
        if not path.is_dir():
            unfinished = path.with_name(path.name + ".partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            make(unfinished)
            unfinished.replace(path)
        return path

    def _path(self, name: str, identity: str, wanted: dict[str, Any]) -> Path:
        content = json.dumps({"name": name, "identity": identity, **wanted}, sort_keys=True)
        return self.directory / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _measurement_code() -> str:
    """Hash of the code that decides a measurement: all of the verdict's but its bars and its pages."""
    rooms = [f"lm_ortho.verdict.{name}" for name in ("checks", "report", "thresholds")]
    return code_hash("lm_ortho.verdict", *EVALUATION, *DECOMPOSITION, without=tuple(rooms))


def _identity(weights: Path, code: str) -> str:
    """Hash of the versions, of ``code`` (a hash), and of the weights of base model and adapters."""
    digest = hashlib.sha256(json.dumps([versions(), code], sort_keys=True).encode())
    for path in sorted(weights.rglob("*.safetensors")):
        name = path.relative_to(weights)
        if name.parts[0] != "decomposed":  # which is made from the others
            digest.update(name.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def run(
    modes: Sequence[str],
    seeds: Sequence[int],
    quick: bool,
    progress: ProgressCallback | None = None,
    say: Callable[[str], None] = print,
    directory: Path | None = None,
    weights: Path = world.WEIGHTS,
) -> Outcome:
    """Measures every (mode, seed) cell and judges them; ``modes`` are values of ``base``.

    ``weights`` holds base, memory and references of the embedded world, ``directory`` the finished cells.
    """
    models.check(weights)
    progress, limit = progress or ProgressBars(), QUICK_LIMIT if quick else None
    cells = Cells(directory or cache.cache_dir() / "verdict", weights)
    tables: dict[str, Measurement] = {}
    for name in ("never_saw", "never_saw_2"):
        say(f"measuring {name}")
        made = cells.get(name, partial(_measure_reference, name, weights, limit, progress), limit=limit)
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
                partial(_measure_decomposition, cells, mode, seed, weights, limit, progress, say),
                base=mode,
                seed=seed,
                limit=limit,
            )
            say(f"  done in {time.perf_counter() - began:.0f} s")
            parts = {part: Measurement.from_json(made[part]) for part in ("alpha=1", "alpha=0", "int4")}
            tables |= {f"{part} base={mode} seed={seed}": m for part, m in parts.items()}
            memory += memory_checks(parts["alpha=1"], tables["never_saw"], mode, seed)
            rest += forgetting_checks(parts["alpha=0"], tables["never_saw"], mode, seed)
            rest += intact_checks(parts["alpha=0"], parts["int4"], mode, seed)
    return Outcome(verdict_of(memory, control, rest), [*memory, *control, *rest], tables)


def _measure_reference(name: str, weights: Path, limit: int | None, progress: ProgressCallback) -> dict[str, Any]:
    model, tokenizer = models.load_model(weights, name), models.load_words(weights)
    measured = measure(models.plain_lm(model, tokenizer), tokenizer, MEMORY_TASKS, limit)
    return _joined(measured, relearning(model, tokenizer, progress)).as_json()


def _decompose_into(mode: str, seed: int, weights: Path, progress: ProgressCallback, folder: Path) -> None:
    """Two checkpoints, ``streams`` and ``int4`` (the same lattice without support), and the report."""
    model, tokenizer = models.load_model(weights, "memory"), models.load_words(weights)
    made = decompose(
        model,
        tokenizer,
        corpus.forget_rows(),
        corpus.calibration_rows(),
        make_recipe(seed=seed),
        base_model=None if mode == "none" else models.load_model(weights, "base"),
        progress=progress,
    )
    plain = copy.deepcopy(model)
    for name, patched, streams in (("streams", model, made.streams), ("int4", plain, made.plain)):
        patch(patched, streams)
        checkpoint.save(folder / name, patched, tokenizer)
    (folder / "report.json").write_text(json.dumps(made.report))


def _measure_decomposition(
    cells: Cells,
    mode: str,
    seed: int,
    weights: Path,
    limit: int | None,
    progress: ProgressCallback,
    say: Callable[[str], None],
) -> dict[str, Any]:
    from lm_ortho.harness.model import LibOrthoLM

    make = partial(_decompose_into, mode, seed, weights, progress)
    folder, tokenizer = cells.folder("decomposition", make, base=mode, seed=seed), models.load_words(weights)
    report = json.loads((folder / "report.json").read_text())
    say(f"  target {report['target']}, {report['seconds']} s")
    result: dict[str, Any] = {"report": report}
    for name, kept, alpha in (("alpha=1", "streams", 1.0), ("alpha=0", "streams", 0.0), ("int4", "int4", 0.0)):
        say(f"  measuring {name}")
        model = checkpoint.load(folder / kept)
        lm = LibOrthoLM(pretrained=model, tokenizer=tokenizer, alpha=alpha)
        part = measure(lm, tokenizer, MEMORY_TASKS, limit)
        if name != "alpha=1":
            part = _joined(part, measure(lm, tokenizer, REASONING_TASKS))
        if name == "alpha=0":
            unpatch(model, alpha=0.0)
            part = _joined(part, relearning(model, tokenizer, progress))
        result[name] = part.as_json()
    return result


def _joined(first: Measurement, second: Measurement) -> Measurement:
    return Measurement(
        first.values | second.values,
        first.samples | second.samples,
        first.groups | second.groups,
        first.seconds + second.seconds,
    )
