"""Runs many seeds over the domains of this folder, in processes that may crash or hang, and writes a dated table.

    python -m tests.fuzz.campaign --cases 1000000 --seed 0 --jobs 2 --report docs/results/DATE-fuzzing.md

A domain is a module of this folder with ``run_case(seed)``, which raises ``AssertionError`` for a fault and may return
the outcome ``right`` or ``refused``. Its optional ``WEIGHT`` is its share of the cases relative to 1. The seeds of a
domain are ``--seed``, ``--seed`` + 1 and so on, so the same command runs the same cases. A process announces each seed
before it runs it: the seed of a crash or a hang is known, it is run once more alone, and the rest of its chunk goes on.
Ctrl-C and SIGTERM end a campaign with the table of what was run.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pkgutil
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import tests.fuzz
from lm_ortho.markdown import markdown_table, write_text
from lm_ortho.pipeline.code_hash import versions
from tests.fuzz.oracle import REFUSED, RIGHT

CHUNK = 500
"""Cases of one process."""
SECONDS = 60
"""Time of one case, after which its process is killed; a case that Python can interrupt ends earlier by itself."""
SHOWN_SEEDS = 5
"""Seeds that the report lists for each kind of fault."""
OUTCOMES = (RIGHT, REFUSED, "passed")
"""What a case without a fault did; ``passed`` where the domain does not say which."""
context = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Chunk:
    """The seeds from ``start`` up to ``stop`` of a domain."""

    domain: str
    start: int
    stop: int


@dataclass(frozen=True)
class Fault:
    """What went wrong with a seed: the message of an assertion, a crash or a hang."""

    domain: str
    seed: int
    message: str

    @property
    def kind(self) -> str:
        """The message without what differs from seed to seed."""
        return re.sub(r"/tmp/\S+|0x[0-9a-f]+|\d+", "…", self.message)[:100]


@dataclass
class Tally:
    """The results of a domain; ``next_seed`` is the first seed that was not run."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values()) + len(self.faults)


class Worker:
    """A process that runs the seeds of a chunk; its parent can see what it is doing."""

    def __init__(self, module: ModuleType, chunk: Chunk, folder: Path) -> None:
        self.chunk = chunk
        self.started = time.monotonic()
        self.has_crashed = False
        self._seed = context.Value("q", chunk.start, lock=False)
        self._case_started = context.Value("d", self.started, lock=False)
        self._counts = context.Array("q", len(OUTCOMES), lock=False)
        self._faults, sender = context.Pipe(duplex=False)
        arguments = (module, chunk, folder, self._seed, self._case_started, self._counts, sender)
        self._process = context.Process(target=_run_chunk, args=arguments)
        self._process.start()
        sender.close()

    def poll(self, tally: Tally) -> bool:
        """Collects faults, kills a process that hangs; whether the process has ended, whose counts are then added."""
        is_hanging = time.monotonic() - self._case_started.value > SECONDS
        if is_hanging:
            self._process.kill()
            self._process.join()
        has_ended = not self._process.is_alive()
        self._receive(tally)
        if not has_ended:
            return False
        self._process.join()
        self.has_crashed = self.rest is not None
        if self.has_crashed:  # the process is at the seed that ended it
            reason = f"no answer within {SECONDS} seconds" if is_hanging else self._describe_exit()
            tally.faults.append(Fault(self.chunk.domain, self._seed.value, reason))
        self._add(tally)
        return True

    @property
    def rest(self) -> Chunk | None:
        """The seeds after the one that ended the process; None after a whole chunk."""
        seed = int(self._seed.value)
        return None if seed == self.chunk.stop else Chunk(self.chunk.domain, seed + 1, self.chunk.stop)

    def stop(self, tally: Tally) -> None:
        """Kills the process; the case that it is running does not count."""
        self._process.kill()
        self._process.join()
        self._receive(tally)
        self._add(tally)

    def _receive(self, tally: Tally) -> None:
        with contextlib.suppress(EOFError, OSError):
            while self._faults.poll():
                tally.faults.append(Fault(self.chunk.domain, *self._faults.recv()))

    def _add(self, tally: Tally) -> None:
        for name, count in zip(OUTCOMES, self._counts, strict=True):
            tally.outcomes[name] += count
        tally.seconds += time.monotonic() - self.started

    def _describe_exit(self) -> str:
        code = self._process.exitcode or 0
        return (
            f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with code {code}"
        )


def _run_chunk(
    module: ModuleType, chunk: Chunk, folder: Path, seed: Any, started: Any, counts: Any, faults: Any
) -> None:
    """Runs in the process of a ``Worker``."""
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
    faulthandler.disable()  # pytest enables it, and it prints the stack of every crash
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = str(folder)
    for number in range(chunk.start, chunk.stop):
        seed.value, started.value = number, time.monotonic()
        try:
            outcome = module.run_case(number)
        except AssertionError as error:
            faults.send((number, f"{error!s:.300}" or _describe_line(error)))
        except BaseException as error:
            faults.send((number, f"{type(error).__name__} out of run_case: {error!s:.300}"))
        else:
            counts[OUTCOMES.index(outcome if outcome in OUTCOMES else "passed")] += 1
    seed.value = chunk.stop
    faults.close()
    os._exit(0)


def _describe_line(error: AssertionError) -> str:
    """Where an assertion without a message stands."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"assertion in line {trace.tb_lineno} of {trace.tb_frame.f_code.co_name}" if trace else "assertion"


def find_domains() -> dict[str, ModuleType]:
    """The modules of this folder that have ``run_case``, by name."""
    names = [module.name for module in pkgutil.iter_modules(tests.fuzz.__path__)]
    names = [name for name in names if name not in ("campaign", "oracle") and not name.startswith("test_")]
    modules = {name: importlib.import_module(f"tests.fuzz.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "run_case")}


def share_cases(domains: Mapping[str, ModuleType], cases: int) -> dict[str, int]:
    """The number of cases of each domain, in proportion to its weight; together ``cases``."""
    weights = {name: float(getattr(module, "WEIGHT", 1.0)) for name, module in domains.items()}
    shares = {name: int(cases * weight / sum(weights.values())) for name, weight in weights.items()}
    shares[next(iter(shares))] += cases - sum(shares.values())
    return shares


def run_campaign(
    domains: Mapping[str, ModuleType],
    shares: Mapping[str, int],
    *,
    seed: int = 0,
    jobs: int = 1,
    progress: bool = False,
) -> tuple[dict[str, Tally], bool]:
    """Runs the cases; returns the results by domain, and whether all cases were run."""
    tallies = {name: Tally() for name in domains}
    waiting = list(_make_chunks(shares, seed))
    running: list[Worker] = []
    total = sum(shares.values())
    with tempfile.TemporaryDirectory(prefix="fuzz-campaign-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    chunk = waiting.pop(0)
                    running.append(Worker(domains[chunk.domain], chunk, Path(folder)))
                for worker in list(running):
                    if worker.poll(tally := tallies[worker.chunk.domain]):
                        running.remove(worker)
                        if worker.has_crashed:
                            tally.faults[-1] = _run_again(domains, tally.faults[-1], Path(folder))
                        if (rest := worker.rest) is not None and rest.start < rest.stop:
                            waiting.insert(0, rest)
                        _sweep(Path(folder), running)
                if progress:
                    cases, faults = (
                        sum(values)
                        for values in zip(*((t.cases, len(t.faults)) for t in tallies.values()), strict=True)
                    )
                    print(f"\r{cases} of {total} cases, {faults} faults", end="", file=sys.stderr, flush=True)
                time.sleep(0.05)
        except KeyboardInterrupt:
            for worker in running:
                worker.stop(tallies[worker.chunk.domain])
            return tallies, False
    return tallies, True


def _run_again(domains: Mapping[str, ModuleType], fault: Fault, folder: Path) -> Fault:
    """The fault of a process that ended or hung, marked if its seed alone, in a fresh process, does not do the same."""
    worker, tally = Worker(domains[fault.domain], Chunk(fault.domain, fault.seed, fault.seed + 1), folder), Tally()
    while not worker.poll(tally):
        time.sleep(0.05)
    return fault if tally.faults else replace(fault, message=f"{fault.message}, but not when its seed is run alone")


def _make_chunks(shares: Mapping[str, int], seed: int) -> Iterator[Chunk]:
    """The chunks of all domains in turn, so that an interrupted campaign has some cases of each."""
    starts = dict.fromkeys(shares, seed)
    while any(starts[name] < seed + share for name, share in shares.items()):
        for name, share in shares.items():
            start, end = starts[name], seed + share
            if start < end:
                starts[name] = min(start + CHUNK, end)
                yield Chunk(name, start, starts[name])


def _sweep(folder: Path, running: Sequence[Worker]) -> None:
    """Deletes what killed cases left behind, where no other case is running."""
    if not running:
        for path in folder.iterdir():
            shutil.rmtree(path, ignore_errors=True)


def format_report(tallies: Mapping[str, Tally], seed: int, seconds: float, is_whole: bool, command: str) -> str:
    """The page: a row for each domain, and the faults by kind with their seeds."""
    total = sum(tally.cases for tally in tallies.values())
    titles = ("domain", "seeds", "cases", *OUTCOMES, "faults", "seconds", "cases per second")
    rows = [
        (
            name,
            f"{seed} to {seed + tally.cases - 1}" if is_whole and tally.cases else f"from {seed} on",
            f"{tally.cases:,}",
            *(f"{tally.outcomes[outcome]:,}" for outcome in OUTCOMES),
            str(len(tally.faults)),
            f"{tally.seconds:.0f}",
            f"{tally.cases / tally.seconds:.0f}" if tally.seconds else "",
        )
        for name, tally in tallies.items()
    ]
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    parts = [
        f"# Fuzzing, {date.today()}",
        f"{total:,} cases in {seconds / 60:.1f} minutes{'' if is_whole else ', interrupted'}. A case gives a right "
        "result or one clear refusal; anything else (another exception, a crash, a hang, a wrong result, an unclear "
        "message) is a fault.",
        f"    {command}",
        markdown_table(titles, rows),
        f"Python {platform.python_version()}, {packages}; {platform.system()} {platform.machine()}.",
    ]
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.domain, fault.kind), []).append(fault)
    if kinds:
        lines = [
            (
                domain,
                str(len(group)),
                ", ".join(str(fault.seed) for fault in group[:SHOWN_SEEDS]),
                _cell(group[0].message),
            )
            for (domain, _), group in sorted(kinds.items(), key=lambda item: -len(item[1]))
        ]
        parts += ["## Faults", markdown_table(("domain", "cases", "first seeds", "first message"), lines)]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """A message as text of a cell."""
    line = " ".join("".join(c if c.isprintable() else "?" for c in text).split())
    return "`" + line[:160].replace("`", "'").replace("|", "/") + "`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a campaign from the command line; returns 1 if there were faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases of all domains together")
    parser.add_argument("--seed", type=int, default=0, help="first seed of every domain")
    parser.add_argument("--domains", default="", help="names separated by commas; all without it")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--report", type=Path, default=None, help="file of the table, in Markdown")
    options = parser.parse_args(arguments)
    domains = find_domains()
    names = [name for name in options.domains.split(",") if name] or list(domains)
    if unknown := [name for name in names if name not in domains]:
        parser.error(f"unknown domain {unknown[0]!r}; known: {', '.join(domains)}")
    if options.cases < 1 or options.jobs < 1 or options.seed < 0:
        parser.error("--cases and --jobs are at least 1, --seed at least 0")
    domains = {name: domains[name] for name in names}
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started this in the background
        signal.signal(number, signal.default_int_handler)
    start = time.monotonic()
    shares = share_cases(domains, options.cases)
    tallies, is_whole = run_campaign(
        domains, shares, seed=options.seed, jobs=options.jobs, progress=sys.stderr.isatty()
    )
    command = f"python -m tests.fuzz.campaign --cases {options.cases} --seed {options.seed} --domains {','.join(names)}"
    report = format_report(tallies, options.seed, time.monotonic() - start, is_whole, command)
    print(report)
    if options.report is not None:
        write_text(options.report, report)
    return 1 if any(tally.faults for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
