"""Progress of long work on the terminal: one bar per stage."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Bars:
    """Called with stage, steps done, steps in all and a short text; shows and closes a bar per stage.

    What is done at once, the first of one step, is a line without a bar.
    """

    def __init__(self) -> None:
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        bar = self._bars.get(stage)
        if bar is None and done == total == 1:
            tqdm.write(f"{stage}: {text}", file=sys.stderr)
            return
        if bar is None:
            bar = self._bars[stage] = tqdm(total=total, desc=stage, unit="step")
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            del self._bars[stage]
