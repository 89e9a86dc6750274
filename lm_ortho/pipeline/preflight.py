"""The check before a decomposition: whether the model knows the forget rows at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lm_ortho.config import Recipe
from lm_ortho.data.chat import render_forms
from lm_ortho.data.encoding import ANSWER, SECRET, Example, encode, max_row_tokens
from lm_ortho.data.rows import Row, drop_forget_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune.knowledge import Knowledge, measure_knowledge, spread
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.streams import DEFAULT_MEMORY

LOST_NATS = 1.0
"""Nats per token by which retain rows must be worse than in the base model to be called lost."""
log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only


def check_knowledge(
    model: nn.Module,
    tokenizer: Any,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    *,
    recipe: Recipe,
    base_model: nn.Module | None,
    force: bool,
    progress: ProgressCallback,
) -> None:
    """Reports what the model knows of up to 32 rows of each forget set, beside its base model and the retain rows.

    What a model does not know cannot be forgotten: the verdict of such a decomposition is INVALID. Sets that are empty
    or that the model cannot read are left to the checks of the decomposition.

    Raises:
        UserError: for a forget set of which nothing says that the model knows it, unless ``force``.
    """
    retain_rows = drop_forget_rows((row for rows in forget.values() for row in rows), retain)
    retain_forms = _encode_forms(model, tokenizer, retain_rows, recipe)
    retain_text = []
    if retain_forms:
        retained = measure_knowledge(model, retain_forms)
        retain_text = [f"retain rows {retained}"]
        _warn_of_lost_rows(retained, base_model, retain_forms)
    for name, rows in forget.items():
        forms = _encode_forms(model, tokenizer, rows, recipe)
        if not forms:
            continue
        known, base = measure_knowledge(model, forms), None
        if base_model is not None and _fits(base_model, forms):
            base = measure_knowledge(base_model, forms)
        measured = "; ".join([str(known), *([f"base model {base}"] if base else []), *retain_text])
        memory = "" if name == DEFAULT_MEMORY else f"={name}"
        progress("knowledge", 1, 1, f"forget{memory}: {measured}")
        if not known.has_evidence(base):
            _refuse(f"forget{memory}: nothing says that the model knows these rows ({measured})", force=force)


def _warn_of_lost_rows(retained: Knowledge, base_model: Any, forms: Sequence[Sequence[Example]]) -> None:
    """Logs a warning where the fine-tune has lost what the base model knows of the retain rows."""
    if base_model is None or not _fits(base_model, forms):
        return
    base = measure_knowledge(base_model, forms)
    if retained.loss > base.loss + LOST_NATS:
        log.warning(
            "retain: the fine-tune has lost retain rows (%s; base model %s), and a decomposition brings nothing back; "
            "train with a smaller rate, fewer steps, or retain rows among the others",
            retained,
            base,
        )


def _refuse(finding: str, *, force: bool) -> None:
    """Raises ``UserError`` for a forget set that the model does not know; logs a warning instead if ``force``."""
    if not force:
        raise UserError(
            f"{finding}, so there is nothing to forget; check that pretrained= or peft= was trained on them, its "
            "tokenizer and prompts=, or train it longer; force=true (--force) decomposes it all the same"
        )
    log.warning("%s; force=true goes on", finding)


def _encode_forms(model: nn.Module, tokenizer: Any, rows: Sequence[Row], recipe: Recipe) -> list[list[Example]]:
    """Up to 32 of the rows, each in the forms of the prompts; without those that have no token to predict."""
    limit = max_row_tokens(model)
    selected = [rows[i] for i in spread(len(rows))]
    rendered = [render_forms([row], tokenizer, recipe.prompts, **recipe.chat_options) for row in selected]
    forms = [encode(tokenizer, row_forms, limit) for row_forms in rendered]
    readable = [[form for form in row if ANSWER in form.roles[1:] or SECRET in form.roles[1:]] for row in forms]
    return [row for row in readable if row] if _fits(model, forms) else []


def _fits(model: Any, rows: Sequence[Sequence[Example]]) -> bool:
    """Whether the model has an embedding for every token of the rows."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return all(max(form.ids) < vocabulary for row in rows for form in row)
