#!/usr/bin/env python
"""Writes docs/configuration.md and the table of model args in the README, from the schemas of lm_ortho.config.

    python scripts/configuration_reference.py

A test fails while one of them differs from what this would write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lm_ortho.baselines.interface import Budget
from lm_ortho.config import ModelSpec, Recipe, Training
from lm_ortho.leaderboard.config import Axis, Board, Entry, Frontier, Model, Resources, Tuning
from lm_ortho.markdown import markdown_table

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "configuration.md", ROOT / "README.md"
BEGIN, END = "<!-- model args: written by scripts/configuration_reference.py -->", "<!-- end of model args -->"
NOT_MODEL_ARGS = ("model", "recipe")
HEAD = """# Configuration

Written by `python scripts/configuration_reference.py` from the schemas of `lm_ortho.config`; do not edit. An unknown
name, and a value that is not allowed, is an error that names it.
"""
INTRODUCTIONS = {
    "Model args": "For `lm_eval --model libortho --model_args name=value,...`, `simple_evaluate` and "
    "`LibOrthoLM(...)`. "
    "Everything that `--model hf` takes (`dtype`, `device`, `batch_size`, ...) works as well.",
    "Recipe": "Model args, options of `lm-ortho decompose`, settings of the methods `ortho` and "
    "`ortho_merged`, and the "
    "record in a checkpoint (`quantization_config.recipe`).",
    "Fine-tuning": "Options of `lm-ortho implant`.",
    "Boards": "Keys of `board.yaml` for `lm-ortho board run` ([boards.md](boards.md)).",
}
BOARD_PARTS: dict[str, type[BaseModel]] = {
    "models": Model,
    "methods": Entry,
    "frontier": Frontier,
    "frontier.forget, frontier.retain": Axis,
    "budget, tuning.budget": Budget,
    "tuning": Tuning,
    "resources": Resources,
}


def model_arg_fields() -> dict[str, FieldInfo]:
    """The model args that are not part of the recipe."""
    return {name: field for name, field in ModelSpec.model_fields.items() if name not in NOT_MODEL_ARGS}


def page() -> str:
    """The page: a table for each schema."""
    sections = {"Model args": model_arg_fields(), "Recipe": Recipe.model_fields, "Fine-tuning": Training.model_fields}
    text = HEAD
    for title, fields in sections.items():
        text += f"\n## {title}\n\n{INTRODUCTIONS[title]}\n\n{_table(fields)}\n"
    text += f"\n## Boards\n\n{INTRODUCTIONS['Boards']}\n\n{_table(Board.model_fields)}\n"
    for key, schema in BOARD_PARTS.items():
        text += f"\n### {key}\n\n{_table(schema.model_fields)}\n"
    return text


def readme(text: str) -> str:
    """The text of the README with the table of model args as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_table({**model_arg_fields(), **Recipe.model_fields})}\n{END}{after}"


def _table(fields: Mapping[str, FieldInfo]) -> str:
    return markdown_table(("name", "default", "meaning"), _rows(fields))


def _rows(fields: Mapping[str, FieldInfo]) -> Iterable[tuple[str, str, str]]:
    for name, field in fields.items():
        yield f"`{name}`", _default(field), (field.description or "").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None or default in ("", (), {}) or isinstance(default, BaseModel | dict):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ", ".join(f"{each.task} {each.metric}" if isinstance(each, Axis) else str(each) for each in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def main() -> None:
    """Writes both files."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE, README, sep="\n")


if __name__ == "__main__":
    main()
