"""The embedded reference world: fictitious authors, canaries, reasoning, stories, and a small model of them."""

from __future__ import annotations

from pathlib import Path

from lm_ortho.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("base", "memory", "never_saw", "never_saw_2", "decomposed")


def path(name: str) -> Path:
    """Directory of an embedded artefact: base model, adapters (memory, never_saw, never_saw_2), decomposed default.

    Raises:
        UserError: for an unknown name, or when this copy of the package carries no weights.
    """
    if name not in NAMES:
        raise UserError(f"embedded artefact {name!r} is unknown; known: {', '.join(NAMES)}")
    directory = WEIGHTS / name
    if not directory.is_dir():
        raise UserError(f"{directory} is missing: reinstall lm-ortho, or run scripts/build_world.py")
    return directory
