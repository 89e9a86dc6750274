"""Resolves a model specification: checks everything that can be checked before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lm_ortho import checkpoint, world
from lm_ortho.config import ModelSpec, Recipe, make_recipe
from lm_ortho.data.held_out import RetainSplit, split_retain_rows
from lm_ortho.data.rows import Row, drop_forget_rows, read_forget_sets, read_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune.adapter import find_adapter, find_adapter_tokenizer, load_adapter_config
from lm_ortho.finetune.loading import check_decoder, expand_path, load_config, quantisation_method, split_gguf
from lm_ortho.hub import describe_hub_error
from lm_ortho.layer import ortho_layers
from lm_ortho.pipeline.decomposition import check_recipe
from lm_ortho.streams import DEFAULT_MEMORY

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

_ROW_ARGUMENTS = {
    "forget": "rows with what should be forgotten",
    "retain": "rows of the same form about other subjects, which should stay",
}

_OF_EVALUATION = {"chat_template_args"}
"""Keys of the recipe that are also model args of ``hf``; they may be given with a model that is decomposed already."""


class CalibrationSets(NamedTuple):
    """The rows of a decomposition: forget rows by the name of their memory, and retain rows."""

    forget: dict[str, list[Row]]
    retain: list[Row]


@dataclass(frozen=True)
class ResolvedModel:
    """A checked specification. ``kind`` is ``checkpoint`` (decomposed), ``embedded``, ``model`` or ``object``.

    ``location`` is what tokenizer and config are read from, or the model object; ``spec.base`` is auto, none or a path.
    """

    kind: str
    location: Any
    spec: ModelSpec

    @property
    def recipe(self) -> Recipe:
        """The whole recipe, defaults included."""
        return self.spec.recipe

    @cached_property
    def adapter(self) -> str | None:
        """The local directory of the adapter to merge, fetched if it is on the hub; None if there is none."""
        if self.kind == "embedded":
            return str(world.get_path("memory"))
        peft = self.spec.peft
        if peft is None or Path(source := find_adapter(peft)).is_dir():
            return None if peft is None else source
        return download_model("peft", peft, token=self.spec.token)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that was named, else the directory of the adapter if it holds one; None is that of the model.

        ``AutoPeftModel`` of peft takes the tokenizer of the adapter, too: a fine-tune that adds tokens or a chat
        template saves it there.
        """
        if self.spec.tokenizer is not None or self.spec.peft is None or self.adapter is None:
            return self.spec.tokenizer
        if (directory := find_adapter_tokenizer(self.adapter)) is not None:
            log.info("tokenizer: the one in the directory of the adapter; tokenizer= selects another one")
        return directory

    @cached_property
    def calibration_sets(self) -> CalibrationSets:
        """The named sets, else those of the embedded world; every file is read once.

        Raises:
            UserError: for a file that cannot be read, and where all retain rows are forget rows.
        """
        from lm_ortho.world import corpus

        forget = self.spec.forget
        sets = CalibrationSets(
            read_forget_sets(forget) if forget else {DEFAULT_MEMORY: corpus.make_forget_rows()},
            self.retain_split.calibration,
        )
        drop_forget_rows((row for rows in sets.forget.values() for row in rows), sets.retain)
        return sets

    @cached_property
    def retain_split(self) -> RetainSplit:
        """The retain rows of the calibration, and those that are held out of it for evaluation.

        Of the rows of the embedded world none are taken away: it has retain rows that no calibration reads.
        """
        from lm_ortho.world import corpus, people

        if self.spec.retain:
            return split_retain_rows(read_rows(self.spec.retain, "retain"), self.spec.held_out)
        held_out = people.make_rows("retain") if self.spec.held_out == "auto" else self.spec.held_out
        return split_retain_rows(corpus.make_calibration_rows(), held_out)


def resolve(spec: ModelSpec) -> ResolvedModel:
    """The model that a specification describes. Whatever can be refused without loading weights is refused here.

    Raises:
        UserError: names the argument at fault.
    """
    check_recipe(spec.recipe, base_known=True)
    if spec.pretrained is not None:
        directory, options = split_gguf(spec.pretrained, {})
        if options:  # a GGUF file in the place of its directory
            spec = spec.model_copy(update={"pretrained": str(directory), **options})
    resolved = _resolve_kind(spec)
    if resolved.kind != "checkpoint":
        is_merged_here = spec.peft is not None or resolved.kind == "embedded"
        check_recipe(spec.recipe, base_known=is_merged_here if spec.base == "auto" else spec.base != "none")
    return resolved


def _resolve_kind(spec: ModelSpec) -> ResolvedModel:
    if spec.model is not None:
        return _resolve_object(spec)
    if spec.pretrained is None:
        return _resolve_embedded(spec)
    location = locate_model(spec.pretrained)
    config = load_config(location, **spec.loading_options)
    check_decoder(config, f"pretrained={spec.pretrained!r}")
    if (method := quantisation_method(config)) == "libortho":
        return _resolve_checkpoint(spec, location)
    if method:
        raise UserError(f"pretrained={spec.pretrained!r} is quantised already ({method}); decompose the 16-bit model")
    resolved = _with_sets(ResolvedModel("model", location, spec))
    if resolved.adapter is not None:
        load_adapter_config(resolved.adapter)  # kinds that cannot be merged are refused before weights are loaded
    return resolved


def _resolve_embedded(spec: ModelSpec) -> ResolvedModel:
    if spec.peft is not None:
        raise UserError("peft: the embedded model brings its own adapter; give pretrained, too")
    _check_base(spec)
    is_default = not (spec.fresh or spec.forget or spec.retain) and spec.base == "auto" and spec.recipe == make_recipe()
    if is_default and (directory := _shipped_decomposition()) is not None:
        return ResolvedModel("checkpoint", str(directory), spec)
    resolved = ResolvedModel("embedded", str(world.get_path("base")), spec)
    if spec.forget or spec.retain:
        _ = resolved.calibration_sets  # a broken file is found before any model is loaded
    return resolved


def _shipped_decomposition() -> Path | None:
    """The decomposed default, or None where this copy of the package carries none."""
    try:
        return world.get_path("decomposed")
    except UserError as error:
        log.warning("%s; decomposing the embedded model now", error)
        return None


def _resolve_object(spec: ModelSpec) -> ResolvedModel:
    if not isinstance(spec.model, nn.Module):
        kind = type(spec.model).__name__
        raise UserError(f"pretrained is of type {kind}; give a directory, a hub id in quotes, or a model object")
    check_decoder(getattr(spec.model, "config", None), f"pretrained is a {type(spec.model).__name__}")
    if ortho_layers(spec.model):
        _refuse_recipe(spec, "the model is decomposed already")
        return ResolvedModel("object", spec.model, spec)
    if spec.peft is not None:
        raise UserError("peft: merge the adapter into the model object first, or give pretrained as a path")
    return _with_sets(ResolvedModel("object", spec.model, spec))


def locate_model(pretrained: str) -> str:
    """A local directory, or the name of a model on the hub. Raises ``UserError`` for an adapter and for a file."""
    location = expand_path(pretrained)
    path = Path(location)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise UserError(f"pretrained={pretrained!r} is an adapter; give it as peft=, and its model as pretrained=")
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise UserError(f"pretrained={pretrained!r} is a file; give the directory of the model, or a GGUF file")
    return location


def _resolve_checkpoint(spec: ModelSpec, location: str) -> ResolvedModel:
    if spec.fresh:
        raise UserError(
            f"pretrained={spec.pretrained!r} is decomposed already; fresh=true needs the model it came from"
        )
    if spec.peft is not None:
        raise UserError(f"peft: {spec.pretrained!r} is decomposed already; merge adapters before that")
    if not Path(location).is_dir():
        location = download_model("pretrained", location, revision=spec.revision, token=spec.token)
    location = str(Path(location) / spec.subfolder)
    _check_recorded_choices(spec, checkpoint.read_meta(location))
    return ResolvedModel("checkpoint", location, spec)


def _check_recorded_choices(spec: ModelSpec, meta: Mapping[str, Any]) -> None:
    """Raises ``UserError`` if the user chose a value that differs from the one recorded in the checkpoint."""
    choices = spec.recipe.model_dump(include=spec.recipe.model_fields_set - _OF_EVALUATION)
    if spec.base != "auto":
        choices["base"] = spec.base
    recorded = recorded_choices(meta)
    for name, value in choices.items():
        if name in recorded and recorded[name] != value:
            raise UserError(
                f"{name}={value!r} contradicts the checkpoint, which has {name}={recorded[name]!r}; "
                "leave it out, or give the model before decomposition"
            )


def download_model(argument: str, name: str, *, revision: str | None = None, token: str | None = None) -> str:
    """The local directory of a hub repository; errors name the ``argument``."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{argument}={name!r}: could not be read ({describe_hub_error(error, name, revision)})"
        ) from None


def recorded_choices(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The choices a checkpoint was made with: its recipe, and the rest of its metadata."""
    return {**meta, **(meta.get("recipe") or {})}


def _refuse_recipe(spec: ModelSpec, reason: str) -> None:
    names = [name for name in Recipe.model_fields if name in spec.recipe.model_fields_set - _OF_EVALUATION]
    names += [name for name in ("peft", "fresh") if getattr(spec, name)]
    if names:
        raise UserError(f"{names[0]}: {reason}")


def _check_base(spec: ModelSpec) -> None:
    if spec.base.startswith((".", "~", "/")) and not Path(split_gguf(spec.base, {})[0]).expanduser().is_dir():
        raise UserError(f"base={spec.base!r}: no such directory; or use auto, none")


def _with_sets(resolved: ResolvedModel) -> ResolvedModel:
    """The same model with its rows read; every model but the embedded one needs ``forget`` and ``retain``."""
    for name, purpose in _ROW_ARGUMENTS.items():
        if not getattr(resolved.spec, name):
            raise UserError(f"{name}: your own model needs {name}=file.jsonl ({purpose})")
    _check_base(resolved.spec)
    _ = resolved.calibration_sets  # a broken file is found before any model is loaded
    return resolved


def base_label(spec: ModelSpec) -> str:
    """What a checkpoint records about the base model: whether there was one, but not its path."""
    return spec.base if spec.base in ("auto", "none") else "given"


def check_alpha(resolved: ResolvedModel) -> None:
    """Raises ``UserError`` where ``alpha`` names a memory that the model will not have, before it is built."""
    alpha = resolved.spec.alpha
    if not isinstance(alpha, Mapping):
        return
    layers = ortho_layers(resolved.location) if resolved.kind == "object" else {}
    if layers:
        first = next(iter(layers.values()))
        memories = [*first.memories, *first.absent]
    elif resolved.kind == "checkpoint":
        memories = list(checkpoint.list_memories(resolved.location))
    else:
        memories = list(resolved.calibration_sets.forget)
    if unknown := [name for name in alpha if name not in memories]:
        raise UserError(f"alpha: there is no memory {unknown[0]!r}; the model has {', '.join(memories)}")
