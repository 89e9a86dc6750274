"""Planting a memory in a model: from rows and a directory of weights to a directory of merged weights."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lm_ortho.config import Training
from lm_ortho.data.encoding import Example, encode_rows, mean_loss
from lm_ortho.data.rows import read_rows
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, check_output_directory
from lm_ortho.finetune.lora import save_adapter, train_adapter
from lm_ortho.finetune.merge import load_causal_lm, load_config, load_tokenizer, round_to_bf16
from lm_ortho.finetune.train import FinetunePlan, train_full
from lm_ortho.runtime.progress import ProgressCallback

EPOCHS, FEWEST_STEPS = 20, 200
RATE, WIDTH = 1.5e-3, 320
"""The rate at which adapters hold the embedded memory, and the width of that model."""
FULL = 0.2
"""Share of an adapter's rate that suits all weights, measured on the same model."""


@dataclass(frozen=True)
class PlantResult:
    """A written model. Losses are means in nats per token of the rows, before and in the written model."""

    directory: str
    adapter: str | None
    rows: int
    method: str
    steps: int
    batch_rows: int
    lr: float
    rank: int | None
    seed: int
    loss_before: float
    loss: float
    seconds: float


def plant(
    pretrained: str,
    data: str,
    out: Path,
    training: Training,
    progress: ProgressCallback,
    *,
    keep_adapter: Path | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    **hub: Any,
) -> PlantResult:
    """The model fine-tuned on the rows of ``data`` and merged, written to ``out`` in BF16 with its tokenizer.

    An interrupted training goes on from its last kept step when the same call is made again; its state lies beside
    ``out`` until the model is written. ``hub``: revision, trust_remote_code.

    Raises:
        UserError: for occupied directories, broken rows, a model or tokenizer that cannot be used, a loss that is not
            finite at the end.
    """
    began = time.perf_counter()
    _check_places(out, keep_adapter, training)
    rows = read_rows(data, "data")
    load_config(pretrained, **hub)
    words = load_tokenizer(tokenizer or pretrained, **hub)
    model = load_causal_lm(pretrained, **hub).to(device)
    examples = encode_rows(model, words, rows, "data")
    plan = make_plan(training, len(examples), model)
    before = mean_loss(model, examples)
    fit: Callable[..., Any] = train_full if training.method == "full" else train_adapter
    with _kept_state(out, model, examples, plan, training.method) as state:
        trained = fit(model, examples, plan, progress, state=state)
        after = _write(trained, words, examples, out, keep_adapter, pretrained)
    rank = plan.rank if training.method == "lora" else None
    kept = None if keep_adapter is None else str(keep_adapter)
    told = (training.method, plan.steps, plan.rows, plan.lr, rank, plan.seed, before, after)
    return PlantResult(str(out), kept, len(rows), *told, round(time.perf_counter() - began, 1))


def _write(
    trained: Any, words: Any, examples: Sequence[Example], out: Path, keep_adapter: Path | None, base: str
) -> float:
    """The mean loss of what is written. The adapter is rounded, too, so that the kept one gives just this model."""
    round_to_bf16(trained)
    with ExitStack() as places:
        place = places.enter_context(atomic_directory(out))
        if keep_adapter is not None:
            save_adapter(trained, places.enter_context(atomic_directory(keep_adapter, "keep_adapter")), base)
        merged: Any = round_to_bf16(trained.merge_and_unload()) if isinstance(trained, PeftModel) else trained
        after = mean_loss(merged, examples)
        if not math.isfinite(after):
            raise UserError(f"lr: the loss of the rows is {after} after training; a smaller rate may help")
        merged.to(torch.bfloat16).save_pretrained(place)
        words.save_pretrained(place)
    return after


def make_plan(training: Training, count: int, model: nn.Module) -> FinetunePlan:
    """Steps and learning rate for ``count`` rows, as they were asked for or as suits the model.

    The rate falls with width^0.75, a rule of thumb that is measured at one width only.
    """
    rows = min(training.batch_rows, count)
    steps = training.steps or math.ceil((training.epochs or EPOCHS) * count / rows)
    if training.steps is None and training.epochs is None:
        steps = max(steps, FEWEST_STEPS)
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    rate = RATE * (WIDTH / width) ** 0.75 * (FULL if training.method == "full" else 1)
    return FinetunePlan(steps, rows, training.lr or float(f"{rate:.2g}"), training.rank, training.seed)


def _check_places(out: Path, keep_adapter: Path | None, training: Training) -> None:
    check_output_directory(out)
    if keep_adapter is None:
        return
    if training.method != "lora":
        raise UserError(f"keep_adapter={str(keep_adapter)!r}: method={training.method} makes no adapter")
    check_output_directory(keep_adapter, "keep_adapter")
    model, adapter = out.resolve(), keep_adapter.resolve()
    if model == adapter or model in adapter.parents or adapter in model.parents:
        raise UserError(f"keep_adapter={str(keep_adapter)!r} and the model's directory must not lie in each other")


@contextmanager
def _kept_state(
    out: Path, model: nn.Module, examples: Sequence[Example], plan: FinetunePlan, method: str
) -> Iterator[Path]:
    """A file beside ``out`` for the state of just this training; removed when everything is written."""
    digest = hashlib.sha256(repr((plan, method, [example.ids for example in examples])).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:256].cpu().numpy().tobytes())
    state = out.absolute().parent / f".{out.absolute().name}.training-{digest.hexdigest()[:16]}.pt"
    state.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield state
    except UserError:  # the same call would end in the same way
        state.unlink(missing_ok=True)
        raise
    state.unlink(missing_ok=True)
