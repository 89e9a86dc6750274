"""Retain rows that a decomposition does not read, for callers from Python and for the embedded model."""

from __future__ import annotations

from pathlib import Path

import lm_ortho
from lm_ortho.config import make_recipe, make_spec
from lm_ortho.data.rows import Row, read_rows
from lm_ortho.finetune import load_causal_lm, load_tokenizer
from lm_ortho.pipeline.spec import resolve
from lm_ortho.world import corpus, people


def test_python_callers_get_held_out_rows_too(home: Path) -> None:
    rows = [Row(question=f"Where is town {n}?", answer=f"It is in {n}.", subject=f"town {n}") for n in range(110)]
    model, tokenizer = load_causal_lm(home / "plain"), load_tokenizer(home / "plain")
    recipe = make_recipe(sieve="magnitude", projection="rtn", edit="zero", density=0.02, group_size=16)
    arguments = (model, tokenizer, read_rows(home / "forget.jsonl"), rows, recipe)
    lines: list[str] = []

    def record(stage: str, step: int, steps: int, text: str) -> None:
        if stage == "held out":
            lines.append(text)

    for held_out, number in (("auto", 11), ("none", 0), (rows[:3], 3)):
        result = lm_ortho.decompose(*arguments, held_out=held_out, force=True, progress=record)
        assert result.report["held_out"] == number
    assert [text.split()[0] for text in lines] == ["11", "none;", "3"]


def test_the_embedded_default_calibrates_on_all_of_its_rows() -> None:
    """Its world has retain authors that no calibration reads; a tenth less would be another decomposition."""
    embedded = resolve(make_spec(fresh=True))
    assert embedded.calibration_sets.retain == corpus.make_calibration_rows()
    assert embedded.retain_split.held_out == people.make_rows("retain")
