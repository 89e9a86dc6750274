"""What every fuzzed call must do: give a result, or refuse in one clear line; never anything else, never for ever."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import FrameType
from typing import TypeVar

from lm_ortho.errors import UserError

T = TypeVar("T")
RIGHT, REFUSED = "right", "refused"
"""Outcomes of a case that ``run_case`` may return, for the table of a campaign."""
SECONDS = 20
"""Time of one case; the machine may be busy, so it is far above what any case needs."""
MESSAGE_LIMIT = 2000
"""Characters of a message."""


@dataclass(frozen=True)
class Refusal:
    """The message of a ``UserError``."""

    message: str


class HangError(BaseException):
    """A case took too long. No ``except Exception`` of the package can swallow it."""


def attempt(action: Callable[[], T], *, names: Iterable[str], secrets: Sequence[str] = ()) -> T | Refusal:
    """The result of ``action``, or its refusal.

    Args:
        names: a refusal must contain one of them: the argument, the field or the file at fault.
        secrets: texts of the user's rows that no message may contain.

    Raises:
        AssertionError: for any other exception, for an action that takes longer than ``SECONDS``, and for a message
            that is not one printable line of bounded length, names nothing, or holds a secret.
    """
    try:
        with time_limit(SECONDS):
            return action()
    except UserError as error:
        message = str(error)
    except HangError:
        raise AssertionError(f"no answer within {SECONDS} seconds") from None
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} instead of a UserError: {error!s:.300}") from error
    check_message(message, names, secrets)
    return Refusal(message)


def fuzz_case(run_case: Callable[[int], str]) -> Callable[[int], str]:
    """Decorator of a ``run_case``: a result that cannot even be examined is a fault like any other."""

    @wraps(run_case)
    def run(seed: int) -> str:
        try:
            return run_case(seed)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} while the result was examined: {error!s:.300}") from error

    return run


def check_message(message: str, names: Iterable[str], secrets: Sequence[str] = ()) -> None:
    """Raises ``AssertionError`` unless the message is one printable line that names what is at fault."""
    assert message.isprintable(), f"not one printable line: {message!r:.300}"
    assert message.strip(), "an empty message"
    assert len(message) <= MESSAGE_LIMIT, f"a message of {len(message)} characters: {message:.300}"
    message.encode()
    assert any(name in message for name in names), f"names neither argument nor file: {message:.300}"
    for secret in secrets:
        assert secret.lower() not in message.lower(), f"quotes a secret of the rows: {message:.300}"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ``HangError`` after so many seconds; does nothing outside of the main thread, where no signal arrives."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def mutate(draw: random.Random, value: T, mutators: Sequence[Callable[[random.Random, T], T]], most: int = 4) -> T:
    """``value`` after one to ``most`` of the mutators."""
    for _ in range(draw.randint(1, most)):
        value = draw.choice(mutators)(draw, value)
    return value


ODD_TEXTS = (
    "", " ", "\n", "\t", "\x00", "\x1b[31m", "\u202e", "\ud800", "\udfff", "\ufeff", "\u2028", "é", "e\u0301", "東京",
    "🙂",
    "none", "None", "null", "true", "yes", "NaN", "inf", "-1", "0", "1", "1e400", "1_000", "0x10", "0o17", "１",
    "9" * 400,
    "9" * 5000, "a" * 300, "a" * 5000, "../..", "/", "/dev/null", "~", "~nobody", "a/../b", "hub:", "hub:a:b:c", "+",
    ":",
    "a:b", "a:1+b:0", "[/x]", "<script>", "=1+1", "%s%n", "{}", "{0.__class__}", "${HOME}", "'", '"', ",", "\\",
)  # fmt: skip
"""Texts that have broken other programs."""
ODD_VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0,
    1.5, 1e-320,
    1e308, float("nan"), float("inf"), float("-inf"), [], [1], ["a"], [[]], {}, {"a": 1}, {"": None}, (), b"bytes", 1j,
)  # fmt: skip
"""Values of wrong types and at the ends of ranges."""


def odd_value(draw: random.Random) -> object:
    """A text or another value that nobody expects."""
    return draw.choice(ODD_TEXTS) if draw.random() < 0.5 else draw.choice(ODD_VALUES)
