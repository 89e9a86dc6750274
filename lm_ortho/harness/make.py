"""A decomposition in a directory that the user names, with what was reached and what to run next."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_ortho import checkpoint
from lm_ortho.folders import refuse_occupied, whole_directory
from lm_ortho.harness.build import Built, Order, decomposed, resolve
from lm_ortho.harness.progress import Bars
from lm_ortho.implant import Notify
from lm_ortho.layer import streams_of


@dataclass(frozen=True)
class Made:
    """A written checkpoint. ``target`` is None where the recipe needs none; ``recipe`` is the whole one."""

    directory: str
    layers: int
    weights: int
    density: float
    bits_per_weight: float
    base: str
    target: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    checkpoint: str
    seconds: float
    next: str


def make_checkpoint(order: Order, directory: Path, notify: Notify | None = None) -> Made:
    """The checkpoint of a decomposition made now, whatever is shipped or cached.

    Raises:
        UserError: before anything is computed for a bad order or an occupied ``directory``; nothing is left there.
    """
    began = time.perf_counter()
    refuse_occupied(directory)
    source = resolve(replace(order, fresh=True))
    model, tokenizer, meta = decomposed(source, notify or Bars())
    with whole_directory(directory) as scratch:
        checkpoint.save(scratch, model, tokenizer, meta)
    streams, info = streams_of(model), Built(model, meta, directory).info()
    return Made(
        str(directory),
        len(streams),
        sum(layer.n_weights for layer in streams.values()),
        info["density"],
        info["bits_per_weight"],
        meta["base"],
        meta["report"]["target"],
        meta["recipe"],
        info["checkpoint"],
        round(time.perf_counter() - began, 1),
        lm_eval_line(directory, order),
    )


def lm_eval_line(directory: Path, order: Order) -> str:
    """The command that measures the checkpoint at alpha=0 on what it was made with, ready for a shell."""
    given: dict[str, Any] = {"pretrained": str(directory)}
    given |= {name: path for name in ("forget", "retain") if (path := getattr(order, name))}
    given |= {"trust_remote_code": True} if order.source.get("trust_remote_code") else {}
    given["alpha"] = 0
    plain = not any(mark in str(value) for value in given.values() for mark in ',={"')
    told = ",".join(f"{name}={value}" for name, value in given.items()) if plain else json.dumps(given)
    tasks = "tofu_forget,tofu_retain" if order.pretrained is None else "forget_set,retain_set"
    return f"lm_eval --model libortho --model_args {shlex.quote(told)} --tasks {tasks}"
