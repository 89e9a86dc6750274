"""The same table from one process, from two of torchrun and from two workers of Ray; a worker that dies."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm_ortho.harness import distributed
from lm_ortho.leaderboard.bootstrap import Number
from lm_ortho.leaderboard.store import DONE, FAILED, Store
from tests.support.board import HOME, board_text, numbers, run_tiny
from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.usefixtures("isolated_environment")
NICENESS = "RAY_worker_niceness"
METHODS: dict[str, Any] = {
    "methods": [
        {"method": "tiny", "settings": {"shift": 0.1}},
        {"method": "tiny_dial"},
        {"method": "never_saw", "settings": {"shift": 0.02}},
        {"method": "unedited"},
    ]
}


@pytest.fixture(scope="module")
def alone(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    run_tiny(home, out, **METHODS)
    return out


def assert_close(first: Any, second: Any) -> None:
    """Asserts equality within 1e-6, in nested containers too.

    FP32 is that good in nats, so what is large, the perplexities of a random model, is compared by its logarithm (asinh
    is that, and the number itself where it is small); distances are differences of two such numbers.
    """
    if isinstance(first, Number):
        both = ([*number[:3], *number.seeds] for number in (first, second))
        flat = [[None if part is None else math.asinh(part) for part in parts] for parts in both]
        assert flat[0] == pytest.approx(flat[1], rel=1e-6, abs=2e-6)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_close(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, two in zip(first, second, strict=True):
            assert_close(one, two)
    else:
        assert first == second


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), HOME: str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_two_processes_of_torchrun_give_the_same_table(home: Path, alone: Path, tmp_path: Path) -> None:
    out, board = tmp_path / "out", tmp_path / "tiny.yaml"
    board.write_text(board_text(home, **METHODS))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "lm_ortho", "board", "run", str(board), "-o", str(out), "--trust-remote-code"]
    process = subprocess.run(command, env=environment(home), capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("leaderboard.html") == 1
    assert_close(values(out), values(alone))
    assert len(list((out / "results").glob("*/results_*.json"))) == 10
    samples = Store(out).records()[1].result["documents"], Store(alone).records()[1].result["documents"]
    assert samples[0] == samples[1]


def values(out: Path) -> dict[str, Any]:
    """The table without the hashes and commands."""
    return {name: fields[:6] for name, fields in numbers(out).items()}


def test_samples_and_values_come_back_in_the_order_of_the_documents() -> None:
    samples = [
        [{"doc_id": i, "filter": "none", "metrics": ["a", "b"] if i != 2 else ["a"]} for i in range(r, 5, 2)]
        for r in (0, 1)
    ]
    assert [sample["doc_id"] for sample in distributed._merge_samples(samples)] == [0, 1, 2, 3, 4]
    parts = [
        {"t": {("a", "none"): [0, 2, 4], ("b", "none"): [0, 4]}},
        {"t": {("a", "none"): [1, 3], ("b", "none"): [1, 3]}},
    ]
    task_samples = [{"t": part} for part in samples]
    assert distributed._merge_values("t", parts, task_samples) == {
        ("a", "none"): [0, 1, 2, 3, 4],
        ("b", "none"): [0, 1, 3, 4],
    }
    assert distributed._merge_values("t", parts, None)["a", "none"] == [0, 1, 2, 3, 4]


def test_one_process_is_not_spread() -> None:
    assert (
        distributed.world_size(),
        distributed.rank(),
        distributed.make_accelerator("cpu"),
        distributed.broadcast("x"),
    ) == (
        1,
        0,
        None,
        "x",
    )


def without_comparisons(table: dict[str, Any]) -> dict[str, Any]:
    """Numbers and distances of the rows; which row is best depends on the other rows."""
    return {name: row[:3] for name, row in table.items()}


@pytest.fixture(scope="module")
def cluster(home: Path) -> Any:
    """A Ray cluster of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    variables = {name: environment(home)[name] for name in ("PYTHONPATH", HOME, "OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    os.environ[NICENESS] = "0"  # at Ray's own 15 the workers starve beside any other process
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": variables},
    )
    yield ray
    ray.shutdown()
    del os.environ[NICENESS]


@pytest.mark.slow  # each worker imports torch, which takes long beside Ray's own processes
def test_two_workers_of_ray_give_the_same_table_and_one_may_die(
    cluster: Any, home: Path, alone: Path, tmp_path: Path
) -> None:
    out, marker = tmp_path / "out", tmp_path / "died"
    methods = [*METHODS["methods"], {"method": "tiny_other", "settings": {"die_once": str(marker)}}]
    tally = run_tiny(home, out, methods=methods, resources={"executor": "ray", "cpus": 1})
    assert tally is not None
    assert tally.complete
    assert marker.exists()
    records = Store(out).records()
    attempts = {(r.piece.config["method"], r.piece.kind): r.attempts for r in records}
    assert {key: tries for key, tries in attempts.items() if tries != 1} == {("tiny_other", "make"): 2}
    table = values(out)
    table.pop(f"tiny_other die_once={marker}")
    assert_close(without_comparisons(table), without_comparisons(values(alone)))


@pytest.mark.slow
def test_a_worker_that_always_dies_is_given_up(cluster: Any, home: Path, tmp_path: Path) -> None:
    never = tmp_path / "no" / "such" / "folder"
    methods = [{"method": "tiny", "settings": {"die_always": str(never)}}]
    out = tmp_path / "out"
    tally = run_tiny(home, out, methods=methods, tasks=["retain_set"], resources={"executor": "ray"})
    assert tally is not None
    assert tally.failed == 2
    make, _ = Store(out).records()
    assert make.status == FAILED
    assert "its worker died 3 times" in make.error
    assert make.status != DONE
