"""Runs the verdict: compares a fresh decomposition of the embedded model with INT4 and the retain-only models."""

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

from torch import nn

from lm_ortho import checkpoint, world
from lm_ortho.checkpoint import cache
from lm_ortho.config import make_recipe
from lm_ortho.errors import UserError
from lm_ortho.files import make_private_directory, temporary_name
from lm_ortho.layer import patch, unpatch
from lm_ortho.pipeline.code_hash import DECOMPOSITION, EVALUATION, code_hash, versions
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.model_lattice import quantise
from lm_ortho.pipeline.preparation import encode_sets
from lm_ortho.runtime.progress import ProgressBars, ProgressCallback
from lm_ortho.verdict import models
from lm_ortho.verdict.attacks import ATTACKS
from lm_ortho.verdict.checks import Check, check_forgetting, check_intact, check_memory, decide_verdict
from lm_ortho.verdict.measurements import MEMORY_TASKS, REASONING_TASKS, Measurement, measure
from lm_ortho.verdict.relearning import measure_relearning
from lm_ortho.world import corpus

QUICK_LIMIT = 200
"""Documents per memory task with ``--quick``; reasoning keeps all, its acceptance threshold needs them."""


@dataclass(frozen=True)
class Outcome:
    """PASS, FAIL or INVALID with every check; ``tables`` holds the measurements by model for printing."""

    verdict: str
    checks: list[Check]
    tables: dict[str, Measurement]

    def to_json(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}


class ResultCache:
    """Stores finished measurements and decompositions on disk, so that an interrupted run resumes.

    A key is a hash of the library versions, the code that computes the result, the weights and the settings.
    """

    def __init__(self, directory: Path, weights: Path = world.WEIGHTS) -> None:
        self.directory = directory
        try:
            make_private_directory(directory)
        except OSError as error:
            raise UserError(
                f"{str(directory)!r} cannot hold the results of a verdict ({error.strerror}); LM_ORTHO_CACHE names "
                "another folder"
            ) from None
        self._identity = _compute_identity(weights, _hash_measurement_code())
        self._decomposition_identity = _compute_identity(weights, code_hash(*DECOMPOSITION))

    def get(self, name: str, compute: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """Returns the stored result, or calls ``compute`` and stores its result."""
        path = self._get_path(name, self._identity, settings).with_suffix(".json")
        if (stored_result := _read_result(path)) is not None:
            return stored_result
        result = compute()
        make_private_directory(path.parent)
        partial_path = path.with_name(temporary_name(path))
        try:
            partial_path.write_text(json.dumps(result))
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)
        return result

    def has(self, name: str, **settings: Any) -> bool:
        """Whether the result is stored."""
        return _read_result(self._get_path(name, self._identity, settings).with_suffix(".json")) is not None

    def get_folder(self, name: str, fill: Callable[[Path], None], **settings: Any) -> Path:
        """Returns the stored folder, or calls ``fill`` with a new one and stores it.

        The folder stays valid when only the code of measurements changes.
        """
        path = self._get_path(name, self._decomposition_identity, settings)
        if not path.is_dir():
            partial_path = path.with_name(path.name + ".partial")
            shutil.rmtree(partial_path, ignore_errors=True)
            make_private_directory(partial_path)
            fill(partial_path)
            partial_path.replace(path)
        return path

    def _get_path(self, name: str, identity: str, settings: dict[str, Any]) -> Path:
        content = json.dumps({"name": name, "identity": identity, **settings}, sort_keys=True)
        return self.directory / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _read_result(path: Path) -> dict[str, Any] | None:
    """The stored result; None where there is none, and where a full disk or a crash has left half of it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def _hash_measurement_code() -> str:
    """Hashes the code that determines a measurement: all of the verdict's except checks, thresholds and report."""
    modules = [f"lm_ortho.verdict.{name}" for name in ("checks", "report", "thresholds")]
    return code_hash("lm_ortho.verdict", *EVALUATION, *DECOMPOSITION, without=tuple(modules))


def _compute_identity(weights: Path, code: str) -> str:
    """Hashes the versions, ``code`` (a hash), and the weights of base model and adapters."""
    digest = hashlib.sha256(json.dumps([versions(), code], sort_keys=True).encode())
    for path in sorted(weights.rglob("*.safetensors")):
        name = path.relative_to(weights)
        if name.parts[0] != "decomposed":  # the decomposed default is computed from the others
            digest.update(name.as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def run(
    modes: Sequence[str],
    seeds: Sequence[int],
    quick: bool,
    *,
    progress: ProgressCallback | None = None,
    log: Callable[[str], None] = print,
    directory: Path | None = None,
    weights: Path = world.WEIGHTS,
    attacks: Sequence[str] = (),
) -> Outcome:
    """Decomposes and measures the model for every mode and seed, and checks the results.

    ``modes`` are values of ``base``. ``weights`` holds the base model, the memory and the retain-only models of the
    embedded world, ``directory`` the stored results. ``attacks`` are names of further attacks, run on alpha=0 and on
    the retain-only model; their results are rows of the table, and no check depends on them.

    Raises:
        UserError: for missing weights and for an unknown attack.
    """
    models.check_weights(weights)
    for attack in attacks:
        ATTACKS.get(attack)
    progress, limit = progress or ProgressBars(), QUICK_LIMIT if quick else None
    results = ResultCache(directory or cache.cache_dir() / "verdict", weights)
    tables: dict[str, Measurement] = {}
    # 1. Measure both retain-only models; the second one is the control.
    for name in ("never_saw", "never_saw_2"):
        log(f"measuring {name}")
        result = results.get(name, partial(_measure_retain_only, name, weights, limit, progress), limit=limit)
        tables[name] = Measurement.from_json(result)
    control = check_forgetting(tables["never_saw_2"], tables["never_saw"], "-", 0, "second reference")
    run_attack = partial(_measure_attack, results, weights=weights, progress=progress, log=log)
    for attack in attacks:
        tables[f"never_saw after {attack}"] = run_attack(attack, partial(models.load_model, weights, "never_saw"))
    memory: list[Check] = []
    checks: list[Check] = []
    for mode in modes:
        for seed in seeds:
            # 2. Decompose and measure at alpha=1, alpha=0 and in plain INT4.
            log(f"decomposing and measuring base={mode} seed={seed}")
            start_time = time.perf_counter()
            measure_decomposition = partial(
                _measure_decomposition,
                results,
                mode,
                seed,
                weights=weights,
                limit=limit,
                progress=progress,
                log=log,
            )
            result = results.get("decomposed", measure_decomposition, base=mode, seed=seed, limit=limit)
            log(f"  done in {time.perf_counter() - start_time:.0f} s")
            # 3. Check all of them.
            parts = {part: Measurement.from_json(result[part]) for part in ("alpha=1", "alpha=0", "int4")}
            tables |= {f"{part} base={mode} seed={seed}": m for part, m in parts.items()}
            for attack in attacks:
                fill = partial(_decompose_into, mode, seed, weights, progress)
                folder = results.get_folder("decomposition", fill, base=mode, seed=seed)
                tables[f"alpha=0 base={mode} seed={seed} after {attack}"] = run_attack(
                    attack, partial(_load_alpha0, folder), base=mode, seed=seed
                )
            memory += check_memory(parts["alpha=1"], tables["never_saw"], mode, seed)
            checks += check_forgetting(parts["alpha=0"], tables["never_saw"], mode, seed)
            checks += check_intact(parts["alpha=0"], parts["int4"], mode, seed)
    return Outcome(decide_verdict(memory, control, checks), [*memory, *control, *checks], tables)


def _measure_retain_only(name: str, weights: Path, limit: int | None, progress: ProgressCallback) -> dict[str, Any]:
    model, tokenizer = models.load_model(weights, name), models.load_tokenizer(weights)
    measurement = measure(models.make_hf_lm(model, tokenizer), tokenizer, MEMORY_TASKS, limit)
    return _merge_measurements(measurement, measure_relearning(model, tokenizer, progress)).to_json()


def _measure_attack(
    results: ResultCache,
    attack: str,
    load: Callable[[], nn.Module],
    *,
    weights: Path,
    progress: ProgressCallback,
    log: Callable[[str], None],
    **settings: Any,
) -> Measurement:
    """The model that ``load`` gives after an attack."""

    def compute() -> dict[str, Any]:
        log(f"  attack {attack}")
        return ATTACKS.get(attack)(load(), models.load_tokenizer(weights), progress).to_json()

    return Measurement.from_json(
        results.get(f"attack-{attack}", compute, plugin=ATTACKS.find_plugin(attack), **settings)
    )


def _load_alpha0(folder: Path) -> nn.Module:
    """The plain model of a stored decomposition at alpha=0."""
    model = checkpoint.load(folder / "streams")
    unpatch(model, alpha=0.0)
    return model


def _decompose_into(mode: str, seed: int, weights: Path, progress: ProgressCallback, folder: Path) -> None:
    """Writes two checkpoints, ``streams`` and ``int4`` (plain quantisation), and the report."""
    model, tokenizer = models.load_model(weights, "memory"), models.load_tokenizer(weights)
    recipe, forget, retain = make_recipe(seed=seed), corpus.make_forget_rows(), corpus.make_calibration_rows()
    examples = encode_sets(model, tokenizer, forget, retain, recipe=recipe).retain
    int4_streams = quantise(model, examples, recipe, progress=progress)
    decomposition = decompose(
        model,
        tokenizer,
        forget,
        retain,
        recipe,
        base_model=None if mode == "none" else models.load_model(weights, "base"),
        progress=progress,
    )
    int4_model = copy.deepcopy(model)
    for name, target, streams in (
        ("streams", model, decomposition.streams),
        ("int4", int4_model, int4_streams),
    ):
        patch(target, streams)
        checkpoint.save(folder / name, target, tokenizer)
    (folder / "report.json").write_text(json.dumps(decomposition.report))


def _measure_decomposition(
    results: ResultCache,
    mode: str,
    seed: int,
    *,
    weights: Path,
    limit: int | None,
    progress: ProgressCallback,
    log: Callable[[str], None],
) -> dict[str, Any]:
    from lm_ortho.harness.model import LibOrthoLM

    # 1. Decompose, or take the stored decomposition.
    fill = partial(_decompose_into, mode, seed, weights, progress)
    folder = results.get_folder("decomposition", fill, base=mode, seed=seed)
    tokenizer = models.load_tokenizer(weights)
    report = json.loads((folder / "report.json").read_text())
    log(f"  target {report['target']}, {report['seconds']} s")
    result: dict[str, Any] = {"report": report}
    # 2. Measure it at both ends of alpha and in plain INT4; reasoning and relearning only where a check needs them.
    for name, subfolder, alpha in (("alpha=1", "streams", 1.0), ("alpha=0", "streams", 0.0), ("int4", "int4", 0.0)):
        log(f"  measuring {name}")
        model = checkpoint.load(folder / subfolder)
        lm = LibOrthoLM(pretrained=model, tokenizer=tokenizer, alpha=alpha)
        part = measure(lm, tokenizer, MEMORY_TASKS, limit)
        if name != "alpha=1":
            part = _merge_measurements(part, measure(lm, tokenizer, REASONING_TASKS))
        if name == "alpha=0":
            unpatch(model, alpha=0.0)
            part = _merge_measurements(part, measure_relearning(model, tokenizer, progress))
        result[name] = part.to_json()
    return result


def _merge_measurements(first: Measurement, second: Measurement) -> Measurement:
    return Measurement(
        first.values | second.values,
        first.samples | second.samples,
        first.groups | second.groups,
        first.seconds + second.seconds,
    )
