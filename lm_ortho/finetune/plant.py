"""Plants a memory in a model: fine-tunes a model directory on rows and writes a directory of merged weights."""

from __future__ import annotations

import hashlib
import logging
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
from lm_ortho.finetune.knowledge import Knowledge, measure_knowledge, spread
from lm_ortho.finetune.loading import load_causal_lm, load_config, load_tokenizer, round_to_bf16
from lm_ortho.finetune.lora import save_adapter, train_adapter
from lm_ortho.finetune.merge import merge_peft_model
from lm_ortho.finetune.merge_check import first_ids
from lm_ortho.finetune.train import FinetunePlan, train_full
from lm_ortho.runtime.progress import ProgressCallback

log = logging.getLogger(__name__)

EPOCHS, MIN_STEPS = 20, 200
REFERENCE_RATE, REFERENCE_WIDTH = 1.5e-3, 320
"""Learning rate at which adapters memorise the embedded memory, and the width of the embedded model."""
FULL_RATE_SHARE = 0.2
"""Learning rate of full fine-tuning as a share of an adapter's rate, measured on the same model."""


@dataclass(frozen=True)
class PlantResult:
    """A written model, with the mean loss of the rows in nats per token before training and in the written model.

    ``extracted`` of ``measured`` rows are extracted from it (``Knowledge``), and ``is_known`` says whether there is any
    evidence that it knows them, by the measure with which a decomposition begins.
    """

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
    measured: int
    extracted: int
    is_known: bool
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
    """Fine-tunes a model on the rows of ``data``, merges it and writes it to ``out`` in BF16 with its tokenizer.

    An interrupted run resumes from its last saved step if the same call is made again; its state is a file beside
    ``out`` until the model is written. ``hub``: revision, trust_remote_code.

    Raises:
        UserError: for directories that are not empty, broken rows, a model or tokenizer that cannot be used, and a
            final loss that is not finite.
    """
    start_time = time.perf_counter()
    # 1. Check directories and rows before anything large is loaded.
    _check_directories(out, keep_adapter, training)
    rows = read_rows(data, "data")
    # 2. Load the model and encode the rows.
    load_config(pretrained, **hub)
    model_tokenizer = load_tokenizer(tokenizer or pretrained, **hub)
    model = load_causal_lm(pretrained, **hub).to(device)
    examples = encode_rows(model, model_tokenizer, rows, argument="data")
    # 3. Choose steps and learning rate, and measure the loss before training.
    plan = make_plan(training, len(examples), model)
    loss_before = mean_loss(model, examples)
    knowledge_before = measure_knowledge(model, _sample(examples))
    # 4. Train, then write the merged model.
    train: Callable[..., Any] = train_full if training.method == "full" else train_adapter
    with _state_file(out, model, examples, plan=plan, method=training.method) as state:
        trained_model = train(model, examples, plan, progress=progress, state=state)
        output = _Output(out, keep_adapter, base=pretrained)
        loss_after, knowledge = _write_merged(trained_model, model_tokenizer, examples, output=output)
    return PlantResult(
        directory=str(out),
        adapter=None if keep_adapter is None else str(keep_adapter),
        rows=len(rows),
        method=training.method,
        steps=plan.steps,
        batch_rows=plan.rows,
        lr=plan.lr,
        rank=plan.rank if training.method == "lora" else None,
        seed=plan.seed,
        loss_before=loss_before,
        loss=loss_after,
        measured=knowledge.rows,
        extracted=knowledge.extracted,
        is_known=knowledge.has_evidence(knowledge_before),
        seconds=round(time.perf_counter() - start_time, 1),
    )


@dataclass(frozen=True)
class _Output:
    """Directories to write: the merged model, and the adapter if requested, with the name of its base model."""

    model: Path
    adapter: Path | None
    base: str


def _sample(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples on which knowledge is measured, each in its only form."""
    return [[examples[i]] for i in spread(len(examples))]


def _write_merged(
    trained_model: Any, tokenizer: Any, examples: Sequence[Example], output: _Output
) -> tuple[float, Knowledge]:
    """Writes the merged model, its tokenizer and the adapter; returns its mean loss, and what it knows of the rows."""
    # 1. Round the adapter before merging, so that merging the written adapter gives exactly the written model.
    round_to_bf16(trained_model)
    with ExitStack() as stack:
        directory = stack.enter_context(atomic_directory(output.model))
        if output.adapter is not None:
            adapter_directory = stack.enter_context(atomic_directory(output.adapter, "keep_adapter"))
            save_adapter(trained_model, adapter_directory, output.base)
        # 2. Merge.
        merged_model: Any = trained_model
        if isinstance(trained_model, PeftModel):
            merged_model = round_to_bf16(merge_peft_model(trained_model, first_ids(examples), "method=lora").model)
        # 3. Measure the loss of exactly these weights, and write them only if it is finite.
        loss = mean_loss(merged_model, examples)
        if not math.isfinite(loss):
            raise UserError(f"lr: the loss of the rows is {loss} after training; a smaller rate may help")
        knowledge = measure_knowledge(merged_model, _sample(examples))
        merged_model.to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return loss, knowledge


def make_plan(training: Training, count: int, model: nn.Module) -> FinetunePlan:
    """Returns the plan for ``count`` rows: steps and learning rate as requested, else defaults for the model.

    The default rate falls with width^0.75, a rule of thumb that is measured at one width only.
    """
    rows = min(training.batch_rows, count)
    steps = training.steps or math.ceil((training.epochs or EPOCHS) * count / rows)
    if training.steps is None and training.epochs is None:
        steps = max(steps, MIN_STEPS)
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    rate = REFERENCE_RATE * (REFERENCE_WIDTH / width) ** 0.75 * (FULL_RATE_SHARE if training.method == "full" else 1)
    lr = training.lr or float(f"{rate:.2g}")
    return FinetunePlan(steps, rows, lr, rank=training.rank, seed=training.seed)


def _check_directories(out: Path, keep_adapter: Path | None, training: Training) -> None:
    check_output_directory(out)
    if keep_adapter is None:
        return
    if training.method != "lora":
        raise UserError(f"keep_adapter={str(keep_adapter)!r}: method={training.method} trains no adapter")
    check_output_directory(keep_adapter, "keep_adapter")
    model, adapter = out.resolve(), keep_adapter.resolve()
    if model == adapter or model in adapter.parents or adapter in model.parents:
        raise UserError(f"keep_adapter={str(keep_adapter)!r} and the model's directory must not contain each other")


@contextmanager
def _state_file(
    out: Path, model: nn.Module, examples: Sequence[Example], *, plan: FinetunePlan, method: str
) -> Iterator[Path]:
    """Context with the path of a file beside ``out`` for the state of this run; deleted when everything is written.

    Its name has a digest of plan, rows and model, so another run never resumes from it. It holds weights trained on the
    rows, so an interruption logs where it is.
    """
    digest = hashlib.sha256(repr((plan, method, [example.ids for example in examples])).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:256].cpu().numpy().tobytes())
    state = out.absolute().parent / f".{out.absolute().name}.training-{digest.hexdigest()[:16]}.pt"
    state.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield state
    except UserError:  # the same call would fail in the same way, so the state is of no use
        state.unlink(missing_ok=True)
        raise
    except BaseException:
        if state.is_file():
            log.warning("%s has the weights trained so far; the same call resumes from it, or delete it", state)
        raise
    state.unlink(missing_ok=True)
