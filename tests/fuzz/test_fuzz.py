"""Every domain answers a few hundred seeds with a right result or one clear refusal; campaigns run a million."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm_ortho.errors import UserError
from tests.fuzz import boards, campaign, command_line, model_args, rows, templates
from tests.fuzz.campaign import find_domains, format_report, main, run_campaign, share_cases
from tests.fuzz.oracle import REFUSED, RIGHT, HangError, Refusal, attempt, time_limit

CASES = {rows: 600, model_args: 600, boards: 200, templates: 400, command_line: 30}


@pytest.mark.parametrize("domain", CASES, ids=lambda domain: domain.__name__.rpartition(".")[2])
def test_every_case_is_right_or_refused_in_one_clear_line(domain) -> None:
    outcomes, faults = [], []
    for seed in range(CASES[domain]):
        try:
            outcomes.append(domain.run_case(seed))
        except AssertionError as error:
            faults.append((seed, str(error)))
    assert faults == []
    # A package that refused everything, or nothing, would be found out.
    assert outcomes.count(RIGHT) >= 0.1 * len(outcomes)
    assert outcomes.count(REFUSED) >= 0.1 * len(outcomes)


@pytest.mark.parametrize("domain", CASES, ids=lambda domain: domain.__name__.rpartition(".")[2])
def test_a_seed_decides_its_case(domain, monkeypatch) -> None:
    draws = list[list[float]]()
    for _ in range(2):
        numbers = list[float]()

        class Recorder(random.Random):
            def random(self, numbers=numbers) -> float:
                number = super().random()
                numbers.append(number)
                return number

        monkeypatch.setattr(domain, "random", SimpleNamespace(Random=Recorder))
        domain.run_case(11)
        draws.append(numbers)
    assert draws[0] == draws[1] != []


def refuse(message: str):
    def action() -> None:
        raise UserError(message)

    return action


def test_the_oracle_accepts_results_and_clear_refusals_only() -> None:
    assert attempt(lambda: 3, names=[]) == 3
    assert attempt(refuse("bits=5: too odd"), names=["bits"]) == Refusal("bits=5: too odd")
    with pytest.raises(AssertionError, match="names neither argument nor file"):
        attempt(refuse("too odd"), names=["bits"])
    with pytest.raises(AssertionError, match="quotes a secret"):
        attempt(refuse("bits: not Marsh Town"), names=["bits"], secrets=["marsh town"])
    for error in (KeyError("x"), ValueError("bits"), SystemExit(1), MemoryError(), RecursionError()):

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.raises(AssertionError, match=f"{type(error).__name__} instead of a UserError"):
            attempt(fail, names=["bits"])


def test_a_case_that_hangs_is_interrupted() -> None:
    def spin() -> None:
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    start = time.monotonic()
    with pytest.raises(HangError), time_limit(0.1):
        spin()
    assert time.monotonic() - start < 10


def run_case_with_all_ends(seed: int) -> str | None:
    """Every thirteenth case is of a kind that a campaign has to survive."""
    if seed == 13:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 26:
        time.sleep(60)
    if seed == 39:
        raise AssertionError("wrong row 39 of 40")
    if seed == 40:
        raise AssertionError("wrong row 40 of 40")
    if seed == 52:
        raise KeyError("x")
    if seed == 65:
        os._exit(0)
    return (RIGHT, REFUSED, None)[seed % 3]


def test_a_campaign_names_the_seed_of_every_crash_hang_and_fault(monkeypatch) -> None:
    monkeypatch.setattr(campaign, "SECONDS", 3)
    monkeypatch.setattr(campaign, "CHUNK", 30)
    domain = SimpleNamespace(run_case=run_case_with_all_ends)
    tallies, is_whole = run_campaign({"odd": domain}, {"odd": 100}, jobs=2)
    tally = tallies["odd"]
    assert is_whole
    assert tally.cases == 100
    assert tally.outcomes == {RIGHT: 33, REFUSED: 30, "passed": 31}
    messages = {fault.seed: fault.message for fault in tally.faults}
    assert messages == {
        13: "the process died of SIGSEGV",
        26: "no answer within 3 seconds",
        39: "wrong row 39 of 40",
        40: "wrong row 40 of 40",
        52: "KeyError out of run_case: 'x'",
        65: "the process ended with code 0",
    }
    page = format_report(tallies, 0, seconds=1.0, is_whole=True, command="x")
    assert "| odd | 0 to 99 | 100 | 33 | 30 | 31 | 6 |" in page
    assert "| odd | 2 | 39, 40 | `wrong row 39 of 40` |" in page


def test_a_crash_that_does_not_come_again_is_marked(tmp_path: Path, monkeypatch) -> None:
    def crash_once(seed: int) -> None:
        if seed == 3 and not (tmp_path / "crashed").exists():
            (tmp_path / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    tallies, _ = run_campaign({"odd": SimpleNamespace(run_case=crash_once)}, {"odd": 9})
    (fault,) = tallies["odd"].faults
    assert (fault.seed, fault.message) == (3, "the process died of SIGKILL, but not when its seed is run alone")


def test_domains_are_found_and_cases_are_shared_by_weight() -> None:
    domains = find_domains()
    assert {"rows", "model_args", "boards", "templates"} <= domains.keys()
    shares = share_cases({"a": SimpleNamespace(WEIGHT=3), "b": SimpleNamespace()}, 101)
    assert sum(shares.values()) == 101
    assert shares["b"] == 25


@pytest.mark.slow
def test_a_campaign_over_all_domains_finds_nothing(tmp_path: Path, capsys) -> None:
    """The same driver runs a million cases; the dated result is in docs/results."""
    report = tmp_path / "report.md"
    jobs = str(min(2, os.cpu_count() or 1))
    assert main(["--cases", "20000", "--seed", "1000000", "--jobs", jobs, "--report", str(report)]) == 0, (
        report.read_text()
    )
    assert report.read_text(encoding="utf-8") in capsys.readouterr().out + "\n"
