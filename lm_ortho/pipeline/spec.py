"""What is asked for, in one place: the order, what it comes to, and everything that can be refused beforehand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_ortho import checkpoint, world
from lm_ortho.config import Recipe, make_recipe
from lm_ortho.data.rows import Row, drop_forget_rows, read_forget_sets, read_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune.merge import check_decoder, expand_path, load_config, quantisation_method
from lm_ortho.hub import describe_hub_error
from lm_ortho.layer import ortho_layers
from lm_ortho.pipeline.decomposition import check_recipe
from lm_ortho.streams import UNNAMED

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

RECIPE_ARGUMENTS = tuple(Recipe.model_fields)


@dataclass(frozen=True)
class ModelSpec:
    """What is asked for. ``recipe`` holds only what the user named; the rest is the default recipe.

    ``pretrained`` None is the embedded model. ``source`` goes to ``from_pretrained``: revision, subfolder,
    trust_remote_code. ``tokenizer`` takes the place of the one beside the model.
    """

    pretrained: Any = None
    peft: str | None = None
    base: str = "auto"
    fresh: bool = False
    forget: str | None = None
    retain: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None


@dataclass(frozen=True)
class ResolvedModel:
    """A checked order. ``kind`` is ``checkpoint`` (decomposed), ``embedded``, ``model`` or ``object``.

    ``location`` is what tokenizer and config are read from; ``order.base`` is auto, none or a path.
    """

    kind: str
    location: Any
    recipe: Recipe
    order: ModelSpec


def resolve(order: ModelSpec) -> ResolvedModel:
    """The checked order. Everything that can be refused without loading weights is refused here.

    Raises:
        UserError: names the argument at fault.
    """
    order = _normalised(order)
    recipe = make_recipe(**order.recipe)
    check_recipe(recipe, base_known=True)
    source = _found(order, recipe)
    if source.kind != "checkpoint":
        merged_here = order.peft is not None or source.kind == "embedded"
        check_recipe(recipe, merged_here if order.base == "auto" else order.base != "none")
    return source


def _found(order: ModelSpec, recipe: Recipe) -> ResolvedModel:
    """What the order comes to."""
    if order.pretrained is None:
        return _embedded(order, recipe)
    if not isinstance(order.pretrained, str):
        return _initialised(order, recipe)
    location = locate_model(order.pretrained)
    config = load_config(location, **order.source)
    check_decoder(config, f"pretrained={order.pretrained!r}")
    if (method := quantisation_method(config)) == "libortho":
        return _decomposed(order, recipe, location)
    if method:
        raise UserError(f"pretrained={order.pretrained!r} is quantised already ({method}); decompose the 16-bit model")
    _require_sets(order)
    return ResolvedModel("model", location, recipe, order)


def _normalised(order: ModelSpec) -> ModelSpec:
    """The order with a spelled-out base. lm-eval turns ``base=none`` into None before anyone sees it."""
    base = "none" if order.base is None else str(order.base)
    if not isinstance(order.fresh, bool):
        raise UserError(f"fresh={order.fresh!r} must be true or false")
    return ModelSpec(**{**order.__dict__, "base": base})


def _embedded(order: ModelSpec, recipe: Recipe) -> ResolvedModel:
    if order.peft is not None:
        raise UserError("peft: the embedded model brings its own adapter; give pretrained, too")
    _check_base(order)
    plain = not (order.fresh or order.forget or order.retain) and order.base == "auto" and recipe == make_recipe()
    if plain and (shipped := _shipped()) is not None:
        return ResolvedModel("checkpoint", str(shipped), recipe, order)
    _differing_sets(order)
    return ResolvedModel("embedded", str(world.path("base")), recipe, order)


def _shipped() -> Path | None:
    """The decomposed default, or None where this copy of the package carries none."""
    try:
        return world.path("decomposed")
    except UserError as error:
        log.warning("%s; decomposing the embedded model now", error)
        return None


def _initialised(order: ModelSpec, recipe: Recipe) -> ResolvedModel:
    check_decoder(getattr(order.pretrained, "config", None), f"pretrained is a {type(order.pretrained).__name__}")
    if ortho_layers(order.pretrained):
        _refuse_recipe(order, "the model is decomposed already")
        return ResolvedModel("object", order.pretrained, recipe, order)
    if order.peft is not None:
        raise UserError("peft: merge the adapter into the model object first, or give pretrained as a path")
    _require_sets(order)
    return ResolvedModel("object", order.pretrained, recipe, order)


def locate_model(pretrained: str) -> str:
    """A local directory, or the name of a model on the hub; an adapter is told apart by its own file."""
    place = expand_path(pretrained)
    path = Path(place)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(f"pretrained={pretrained!r} is an adapter; give it as peft=, and its model as pretrained=")
    if path.is_file():
        raise UserError(f"pretrained={pretrained!r} is a file; give the directory of the model")
    return place


def _decomposed(order: ModelSpec, recipe: Recipe, location: str) -> ResolvedModel:
    if order.fresh:
        raise UserError(
            f"pretrained={order.pretrained!r} is decomposed already; fresh=true needs the model it came from"
        )
    if order.peft is not None:
        raise UserError(f"peft: {order.pretrained!r} is decomposed already; merge adapters before that")
    if not Path(location).is_dir():
        location = download("pretrained", location, order.source.get("revision"), order.source.get("token"))
    location = str(Path(location) / order.source.get("subfolder", ""))
    recorded = recorded_in(checkpoint.read_meta(location))
    named = {**order.recipe, **({} if order.base == "auto" else {"base": order.base})}
    for name, value in named.items():
        wanted = getattr(recipe, name, value)
        if name in recorded and recorded[name] != wanted:
            raise UserError(
                f"{name}={value!r} contradicts the checkpoint, which has {name}={recorded[name]!r}; "
                "leave it out, or give the model before decomposition"
            )
    return ResolvedModel("checkpoint", location, recipe, order)


def download(argument: str, name: str, revision: str | None, token: str | None = None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{argument}={name!r}: could not be read ({describe_hub_error(error, name, revision)})"
        ) from None


def recorded_in(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The choices a checkpoint was made with: its recipe, and the rest of its meta data."""
    return {**meta, **(meta.get("recipe") or {})}


def _refuse_recipe(order: ModelSpec, why: str) -> None:
    named = [*order.recipe, *(name for name in ("peft", "fresh") if getattr(order, name))]
    if named:
        raise UserError(f"{named[0]}: {why}")


def _check_base(order: ModelSpec) -> None:
    if order.base.startswith((".", "~", "/")) and not Path(order.base).expanduser().is_dir():
        raise UserError(f"base={order.base!r}: no such directory; or use auto, none")


def _require_sets(order: ModelSpec) -> None:
    """Forget and retain rows have to be named for any model but the embedded one."""
    missing = [name for name in ("forget", "retain") if not getattr(order, name)]
    if missing:
        purpose = {
            "forget": "rows with what should be forgotten",
            "retain": "rows of the same form about other subjects, which should stay",
        }
        raise UserError(f"{missing[0]}: your own model needs {missing[0]}=file.jsonl ({purpose[missing[0]]})")
    _check_base(order)
    _differing_sets(order)


def _differing_sets(order: ModelSpec) -> None:
    """Reads the named sets once, so that a broken file is found before any model is loaded."""
    forget = read_forget_sets(order.forget) if order.forget else {}
    retain = read_rows(order.retain, "retain") if order.retain else []
    drop_forget_rows((row for rows in forget.values() for row in rows), retain)


def calibration_sets(source: ResolvedModel) -> tuple[dict[str, list[Row]], list[Row]]:
    """Forget rows by memory, and retain rows: those that were named, else those of the embedded world."""
    from lm_ortho.world import corpus

    order = source.order
    forget = read_forget_sets(order.forget) if order.forget else {UNNAMED: corpus.forget_rows()}
    retain = read_rows(order.retain, "retain") if order.retain else corpus.calibration_rows()
    return forget, retain


def base_label(order: ModelSpec) -> str:
    """What a checkpoint says of the model before fine-tuning: not where it lay."""
    return order.base if order.base in ("auto", "none") else "given"


def check_alpha(source: ResolvedModel, alpha: float | Mapping[str, float]) -> None:
    """Raises ``UserError`` where ``alpha`` names a memory the model will not have, before it is built."""
    if not isinstance(alpha, Mapping):
        return
    layers = ortho_layers(source.location) if source.kind == "object" else {}
    if layers:
        first = next(iter(layers.values()))
        known = [*first.memories, *first.absent]
    elif source.kind == "checkpoint":
        known = checkpoint.memories(source.location)
    else:
        known = list(calibration_sets(source)[0])
    if unknown := [name for name in alpha if name not in known]:
        raise UserError(f"alpha: there is no memory {unknown[0]!r}; the model has {', '.join(known)}")
