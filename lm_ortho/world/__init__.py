"""The embedded world: fictitious authors, canaries, reasoning, stories, and a small model trained on them."""

from __future__ import annotations

from pathlib import Path

from lm_ortho.errors import UserError

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("base", "memory", "never_saw", "never_saw_2", "decomposed")


def get_path(name: str) -> Path:
    """Returns the directory of an embedded artefact.

    These are the base model, the adapters (memory, never_saw, never_saw_2) and the decomposed default.

    Raises:
        UserError: For an unknown name, or when this copy of the package carries no weights.
    """
    if name not in NAMES:
        raise UserError(f"embedded artefact {name!r} is unknown; known: {', '.join(NAMES)}")
    directory = WEIGHTS / name
    if not directory.is_dir():
        raise UserError(f"{directory} is missing: reinstall lm-ortho, or run scripts/build_world.py")
    return directory
