"""benchmarks/gpu.py without a GPU: its dry run, and the results that it computes from times."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python in a new process, because the script imports ``kernels`` itself and may set TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode in (0, 2), process.stdout[-3000:] + process.stderr[-3000:]
    return process


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["--dry-run", "--tune", "--rounds", "1", "--out", str(folder), "--tuning-folder", str(folder)]
    run_python(str(BENCHMARKS / "gpu.py"), *arguments, cwd=folder)
    return folder


def test_the_dry_run_checks_and_times_every_variant(dry_run: Path) -> None:
    (path,) = dry_run.glob("*-gpu-dry-run.json")
    results = json.loads(path.read_text("utf-8"))
    assert set(results) >= {"date", "versions", "device", "seed", "command", "peak", "tuning", "seconds"}
    assert results["checks"]
    assert all(record["ok"] for record in results["checks"]), results["checks"]
    assert results["left_out"] == []
    variants = {
        (row["batch"], row["variant"], row.get("kernel"), row.get("density"), row.get("alpha"))
        for row in results["rows"]
    }
    paths = [(1, "fused"), (40, "fused"), (40, "dense")]
    densities_and_alphas = [(0.0, None), (0.01, 0.0), (0.01, 1.0)]
    expected_variants = {(batch, "ours", path, *setting) for batch, path in paths for setting in densities_and_alphas}
    assert variants == expected_variants | {
        (batch, name, None, None, None) for batch in (1, 40) for name in ("bf16", "int4pack")
    }
    for row in results["rows"]:
        assert ("error" in row) == (row["variant"] == "int4pack")
        assert "error" in row or (row["median_us"] > 0 and row["ratio_bf16"] > 0)
    assert [(test["batch"], test["kernel"]) for test in results["null_tests"]] == [
        (1, "fused"),
        (40, "fused"),
        (40, "dense"),
    ]
    assert all(test["low"] <= test["ratio"] <= test["high"] for test in results["null_tests"])


def test_the_search_writes_a_complete_tuning_file(dry_run: Path) -> None:
    results = json.loads((dry_run / "dry-run.json").read_text("utf-8"))
    (entry,) = results["shapes"]
    assert (entry["out_features"], entry["spans"]) == (32, 1)
    assert set(entry["order"]) == {"slices", "split", "slots"}
    assert set(entry["launch"]) == {"1", "2", "4", "8", "16", "32"}
    default = json.loads((BENCHMARKS.parent / "kernels/cuda/tuning/default.json").read_text("utf-8"))
    assert set(results) == set(default)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu
from pathlib import Path
from gpu_device import Device, Timed, paired_ratio

run = gpu.Run(Path(sys.argv[2]) / "a" / "out.json", 60.0, {"device": "none"})
rows = [((14336, 4096), 1, 0.01, 0.0, "fused", 3.1), ((14336, 4096), 1, 0.01, 1.0, "fused", 2.7),
        ((14336, 4096), 1, 0.05, 1.0, "fused", 2.2), ((14336, 4096), 1, 0.05, 1.0, "dense", 2.4)]
for shape, batch, density, alpha, kernel, ratio in rows:
    run.add("rows", {"shape": list(shape), "batch": batch, "density": density, "alpha": alpha, "ratio_bf16": ratio})
gpu.compare_with_targets(run, (14336, 4096), 1)
gpu.compare_with_targets(run, (4096, 4096), 1)
gpu.compare_with_targets(run, (4096, 4096), 4)
assert [t["met"] for t in run.results["targets"]] == [True, False, True, False], run.results["targets"]
assert run.results["targets"][-1]["reached"] is None
run.save()
assert [path.name for path in (Path(sys.argv[2]) / "a").iterdir()] == ["out.json"]

first = list(gpu.list_cases(False))
assert len(first) == len(set(first)) == 42
assert set(gpu.TARGETS) <= set(first[:9])
assert gpu.count_weight_bytes((8, 64), {"variant": "bf16"}) == 1024
assert gpu.count_weight_bytes((8, 64), {"variant": "ours", "density": 0.01, "alpha": 0.0}) == 272
assert gpu.count_weight_bytes((8, 64), {"variant": "ours", "density": 0.25, "alpha": 1.0}) == 784

slow, fast = Timed(2, None, [4.0, 6.0, 8.0]), Timed(1, None, [1.0, 1.5, 2.0])
assert slow.median == 3.0
assert paired_ratio(slow, fast) == {"ratio": 2.0, "low": 2.0, "high": 2.0}
cold = Device("cuda", 50 << 20)
assert [cold.copies(n) for n in (33 << 20, 1 << 30, 1000)] == [5, 2, 1024]
"""


def test_results_from_times(tmp_path: Path) -> None:
    run_python("-c", SCRIPT, str(BENCHMARKS), str(tmp_path))


def test_without_a_gpu_the_script_reports_it() -> None:
    import torch

    if not torch.cuda.is_available():
        process = run_python(str(BENCHMARKS / "gpu.py"))
        assert process.returncode == 2
        assert "no CUDA device" in process.stdout
