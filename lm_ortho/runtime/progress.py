"""Progress of long computations: the type of the callback, and progress bars on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

ProgressCallback = Callable[[str, int, int, str], None]
"""Called with the stage, the number of steps completed, the total number of steps and a short text."""


def no_progress(stage: str, step: int, total: int, text: str) -> None:
    """A ``ProgressCallback`` that reports nothing."""


class ProgressBars:
    """A ``ProgressCallback`` that shows one progress bar per stage and closes it after the last step.

    A stage with a single step is printed as a line without a bar.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, step: int, total: int, text: str) -> None:
        bar = self._bars.get(stage)
        if bar is None and step == total == 1:
            tqdm.write(f"{stage}: {text}", file=sys.stderr)
            return
        if bar is None:
            bar = self._bars[stage] = tqdm(total=total, desc=stage, unit="step")
        bar.set_postfix_str(text, refresh=False)
        bar.update(step - bar.n)
        if step >= total:
            bar.close()
            del self._bars[stage]
