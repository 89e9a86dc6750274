"""Some hundred fuzzed checkpoints, in a process of their own that may crash or hang without taking the suite along."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from tests.fuzz import checkpoints

SECONDS = 240
"""Time of all cases; they take about 3 s on one core."""
SEEDS = range(400)


def run_cases(seeds: range, current: Any, results: Connection) -> None:
    """Runs in the child: the outcome of every seed, and before each its number in ``current``."""
    torch.set_num_threads(1)  # a child must not wait for threads of its parent
    outcomes, failures = dict.fromkeys(("right", "refused"), 0), []
    for seed in seeds:
        current.value = seed
        try:
            outcomes[checkpoints.run_case(seed)] += 1
        except AssertionError as error:
            failures.append(str(error))
    results.send((outcomes, failures))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_fuzzed_checkpoints_are_right_or_refused():
    checkpoints.make_checkpoint()  # once, so that the child need not
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    current = context.Value("q", -1)
    process = context.Process(target=run_cases, args=(SEEDS, current, sender), daemon=True)
    process.start()
    sender.close()
    if not receiver.poll(SECONDS):
        process.kill()
        pytest.fail(f"seed {current.value}: no answer within {SECONDS} seconds")
    try:
        outcomes, failures = receiver.recv()
    except EOFError:
        process.join()
        pytest.fail(f"seed {current.value}: the process ended with exit code {process.exitcode}")
    process.join()
    assert not failures, "\n".join(failures[:10])
    assert sum(outcomes.values()) == len(SEEDS)
    assert min(outcomes.values()) > len(SEEDS) // 5, f"one-sided: {outcomes}"


def test_cases_are_the_same_for_the_same_seed(tmp_path):
    torch.set_num_threads(1)
    assert [checkpoints.run_case(seed) for seed in range(20)] == [checkpoints.run_case(seed) for seed in range(20)]


def test_the_oracle_sees_what_a_broken_validator_would_pass(monkeypatch):
    """Without the validator some seeds must fail; the products of such layers are never computed."""
    monkeypatch.setattr(checkpoints, "validate_layer", lambda *args, **kwargs: None)
    monkeypatch.setattr(checkpoints, "_run_files", lambda draw: "right")
    failed_seeds = []
    for seed in range(40):
        try:
            checkpoints.run_case(seed)
        except AssertionError as error:
            failed_seeds.append((seed, str(error)))
    assert len(failed_seeds) > 5
    assert all(message.startswith(f"seed {seed}: ") for seed, message in failed_seeds)
