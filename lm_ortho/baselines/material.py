"""Where the material of methods comes from: the embedded world, or models and files of one's own."""

from __future__ import annotations

from typing import Any

from lm_ortho import world
from lm_ortho.baselines.interface import Material
from lm_ortho.baselines.tuning import split_of_world
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.finetune import load_tokenizer as tokenizer_at
from lm_ortho.pipeline.build import access_options, load_models, load_tokenizer
from lm_ortho.pipeline.spec import ModelSpec, calibration_sets, locate_model, resolve
from lm_ortho.world import corpus

MODES = ("auto", "none")


def material_of_world(mode: str = "auto", tuning: bool = False, seed: int = 0) -> Material:
    """The embedded models with the rows that are evaluated, or with those of the tuning split that ``seed`` draws.

    ``mode`` as the model arg ``base``: with ``none`` the model before fine-tuning is not there.

    Raises:
        UserError: for another mode, and where this copy of the package carries no weights.
    """
    if mode not in MODES:
        raise UserError(f"base={mode!r} is unknown for the embedded world; known: {', '.join(MODES)}")
    base, merged = (load_causal_lm(world.path("base")) for _ in range(2))
    merged, never_saw = (
        merge_adapter(model, world.path(name))
        for model, name in ((merged, "memory"), (load_causal_lm(world.path("base")), "never_saw"))
    )
    made = Material(
        tokenizer_at(world.path("base")), merged, corpus.forget_rows(), corpus.calibration_rows(),
        base if mode == "auto" else None, never_saw,
    )  # fmt: skip
    return split_of_world(made, seed).material if tuning else made


def material_of_files(
    pretrained: str,
    peft: str | None = None,
    base: str = "auto",
    forget: str = "",
    retain: str = "",
    reference_model: str | None = None,
    tokenizer: str | None = None,
    **hub: Any,
) -> Material:
    """Models and rows of one's own; arguments mean what the model args of the same names do.

    ``reference_model`` is a model that never saw the forget set; it only judges. Several forget sets count as one.

    Raises:
        UserError: names the argument at fault, before any weights are loaded where that is possible.
    """
    order = ModelSpec(
        pretrained, peft, base, forget=forget or None, retain=retain or None, source=hub, tokenizer=tokenizer
    )
    source = resolve(order)
    if source.kind != "model":
        raise UserError(f"pretrained={pretrained!r} is decomposed already; methods start from the model it came from")
    sets, kept = calibration_sets(source)
    rows: list[Row] = [row for each in sets.values() for row in each]
    merged, before = load_models(source)
    never_saw = None
    if reference_model is not None:
        never_saw = load_causal_lm(locate_model(reference_model), argument="reference", **access_options(order))
    return Material(load_tokenizer(source), merged, rows, kept, before, never_saw)
