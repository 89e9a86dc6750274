"""Loads the material of methods: from the embedded world, or from your own models and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_ortho import world
from lm_ortho.baselines.interface import Material
from lm_ortho.baselines.tuning import split_world
from lm_ortho.config import make_spec
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.finetune import load_tokenizer as load_embedded_tokenizer
from lm_ortho.pipeline.loading import load_models, load_tokenizer
from lm_ortho.pipeline.spec import locate_model, resolve
from lm_ortho.world import corpus

MODES = ("auto", "none")


def material_from_world(mode: str = "auto", tuning: bool = False, seed: int = 0) -> Material:
    """The embedded models with the evaluated rows, or (``tuning``) with the rows of the tuning split of ``seed``.

    ``mode`` is that of the model arg ``base``: ``none`` leaves out the base model.

    Raises:
        UserError: for another mode, and where this copy of the package has no weights.
    """
    if mode not in MODES:
        raise UserError(f"base={mode!r} is unknown for the embedded world; known: {', '.join(MODES)}")
    merged, reference = (
        merge_adapter(load_causal_lm(world.get_path("base")), world.get_path(adapter))
        for adapter in ("memory", "never_saw")
    )
    material = Material(
        tokenizer=load_embedded_tokenizer(world.get_path("base")),
        merged=merged,
        forget=corpus.make_forget_rows(),
        retain=corpus.make_calibration_rows(),
        base=load_causal_lm(world.get_path("base")) if mode == "auto" else None,
        reference=reference,
    )
    return split_world(material, seed).material if tuning else material


def material_from_files(
    pretrained: str,
    peft: str | None = None,
    base: str = "auto",
    forget: str = "",
    retain: str = "",
    reference_model: str | None = None,
    tokenizer: str | None = None,
    prompts: Mapping[str, Any] | None = None,
    **hub: Any,
) -> Material:
    """Your own models and rows; the arguments mean the same as the model args of these names.

    ``reference_model`` is a retain-only model, used for evaluation only. Several forget sets are joined.
    ``prompts`` are those of the material: ``{"prompts": "chat"}`` trains in the chat template only, at half the cost of
    both forms.

    Raises:
        UserError: names the argument at fault, before any weights are loaded where that is possible.
    """
    spec = make_spec(
        prompts or {},
        pretrained=pretrained,
        peft=peft,
        base=base,
        forget=forget or None,
        retain=retain or None,
        tokenizer=tokenizer,
        held_out="none",
        **hub,
    )
    resolved = resolve(spec)
    if resolved.kind != "model":
        raise UserError(f"pretrained={pretrained!r} is decomposed already; methods start from the model it came from")
    forget_sets, retain_rows = resolved.calibration_sets
    forget_rows: list[Row] = [row for rows in forget_sets.values() for row in rows]
    merged, base_model = load_models(resolved)
    reference = None
    if reference_model is not None:
        reference = load_causal_lm(locate_model(reference_model), argument="reference", **spec.access_options)
    return Material(
        tokenizer=load_tokenizer(resolved),
        merged=merged,
        forget=forget_rows,
        retain=retain_rows,
        base=base_model,
        reference=reference,
        prompts=prompts or {},
    )
