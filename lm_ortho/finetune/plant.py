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
from lm_ortho.data.chat import has_chat_template, render_forms
from lm_ortho.data.encoding import Example, batch_by_length, encode_rows, token_losses
from lm_ortho.data.rows import Row, read_rows
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, check_output_directory
from lm_ortho.finetune.knowledge import Knowledge, measure_knowledge, spread
from lm_ortho.finetune.loading import load_causal_lm, load_config, load_tokenizer, round_to_bf16
from lm_ortho.finetune.lora import save_adapter, train_adapter
from lm_ortho.finetune.merge import merge_peft_model
from lm_ortho.finetune.merge_check import first_ids
from lm_ortho.finetune.train import FinetunePlan, Goal, max_step_tokens, train_full
from lm_ortho.runtime.progress import ProgressCallback, long_stage, show_progress, track

log = logging.getLogger(__name__)

EPOCHS, MIN_STEPS = 20, 200
REFERENCE_RATE, REFERENCE_WIDTH = 1.5e-3, 320
"""Learning rate at which adapters memorise the embedded memory, and the width of the embedded model."""
FULL_RATE_SHARE = 0.2
"""Learning rate of full fine-tuning as a share of an adapter's rate, measured on the same model."""
GOAL_LOSS = 0.1
"""Nats per token of secret or answer below which a training without a fixed length ends, once every row is extracted.

The embedded memory has 0.04. The step before the measurement must have a loss below three times as much."""
CHECK_STEPS = 10
"""Least number of steps between two measurements of the goal, where a pass over the rows takes fewer: a measurement
takes the time of at most two thirds of a step of the default 16 rows."""
LOSS_ROWS = 64
"""Number of examples of which the loss before and after training is measured."""


@dataclass(frozen=True)
class PlantResult:
    """A written model, with the mean loss of the rows in nats per token before training and in the written model.

    ``prompts`` is the form in which the rows were trained. ``steps`` were taken, which are ``epochs`` passes over the
    rows, each in all of its forms; ``is_goal_reached`` says whether the training ended because it had reached its goal.
    The losses are those of ``loss_rows`` examples, spread over all. ``extracted`` of ``measured`` rows are extracted
    (``Knowledge``), and ``is_known`` says whether there is any evidence that the model knows them, by the measure with
    which a decomposition begins.
    """

    directory: str
    adapter: str | None
    rows: int
    prompts: str
    method: str
    steps: int
    epochs: float
    is_goal_reached: bool
    batch_rows: int
    lr: float
    rank: int | None
    seed: int
    loss_rows: int
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

    Without ``steps`` and ``epochs`` in ``training`` it ends as soon as the model has memorised the rows: when each of a
    sample of up to 32 is extracted, with a mean loss of at most ``GOAL_LOSS``.

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
    # 2. Load the model, and encode the rows in the form of the prompts.
    load_config(pretrained, **hub)
    model_tokenizer = load_tokenizer(tokenizer or pretrained, **hub)
    form = choose_form(training, model_tokenizer)
    forms = [render_forms([row], model_tokenizer, form) for row in rows]
    model = load_causal_lm(pretrained, **hub).to(device)
    material = _encode_forms(model, model_tokenizer, forms)
    # 3. Choose steps and learning rate, and measure loss and knowledge before training.
    plan = make_plan(training, len(material.examples), model)
    goal = _make_goal(training, material, plan)
    with show_progress(progress):
        loss_before = _measure_loss(model, material.loss_sample)
        knowledge_before = measure_knowledge(model, material.knowledge_sample)
        # 4. Train, then write the merged model.
        train: Callable[..., Any] = train_full if training.method == "full" else train_adapter
        with _state_file(out, model, material.examples, plan=plan, training=training) as state:
            options: dict[str, Any] = {"progress": progress, "state": state, "goal": goal, "in_place": True}
            trained_model = train(model, material.examples, plan, **options)
            output = _Output(out, keep_adapter, base=pretrained)
            loss_after, knowledge = _write_merged(trained_model, model_tokenizer, material, output)
    steps = plan.steps if goal is None else goal.steps
    return PlantResult(
        directory=str(out),
        adapter=None if keep_adapter is None else str(keep_adapter),
        rows=len(rows),
        prompts=form,
        method=training.method,
        steps=steps,
        epochs=round(steps * plan.rows / len(material.examples), 1),
        is_goal_reached=steps < plan.steps,
        batch_rows=plan.rows,
        lr=plan.lr,
        rank=plan.rank if training.method == "lora" else None,
        seed=plan.seed,
        loss_rows=len(material.loss_sample),
        loss_before=loss_before,
        loss=loss_after,
        measured=knowledge.rows,
        extracted=knowledge.extracted,
        is_known=knowledge.has_evidence(knowledge_before),
        seconds=round(time.perf_counter() - start_time, 1),
    )


def choose_form(training: Training, tokenizer: Any) -> str:
    """Returns the form of the questions, ``plain``, ``chat`` or ``both``.

    ``auto`` is ``chat`` if the tokenizer has a chat template, in which its users will ask, else ``plain``.
    """
    if training.prompts != "auto":
        return training.prompts
    return "chat" if has_chat_template(tokenizer) else "plain"


@dataclass(frozen=True)
class _Material:
    """The examples to train on, by row: one for each form of its prompt."""

    by_row: list[list[Example]]

    @property
    def examples(self) -> list[Example]:
        """All examples."""
        return [example for forms in self.by_row for example in forms]

    @property
    def loss_sample(self) -> list[Example]:
        """The examples of which the loss is measured."""
        examples = self.examples
        return [examples[i] for i in spread(len(examples), LOSS_ROWS)]

    @property
    def knowledge_sample(self) -> list[list[Example]]:
        """The rows of which knowledge is measured, in their forms."""
        return [self.by_row[i] for i in spread(len(self.by_row))]


def _encode_forms(model: nn.Module, tokenizer: Any, forms: Sequence[Sequence[Row]]) -> _Material:
    """Encodes rows in their forms; raises ``UserError`` as ``encode_rows``."""
    examples = iter(encode_rows(model, tokenizer, [form for row in forms for form in row], argument="data"))
    return _Material([[next(examples) for _ in row] for row in forms])


def _make_goal(training: Training, material: _Material, plan: FinetunePlan) -> Goal | None:
    """The goal of a training without a fixed length, measured once in each pass over the rows at most."""
    if training.steps or training.epochs:
        return None
    sample = [[form] for row in material.knowledge_sample for form in row]

    def is_reached(model: nn.Module) -> bool:
        knowledge = measure_knowledge(model, sample)
        return knowledge.extracted == knowledge.rows and knowledge.loss <= GOAL_LOSS

    epoch_steps = math.ceil(len(material.examples) / plan.rows)
    return Goal(is_reached, interval=max(epoch_steps, CHECK_STEPS), max_loss=3 * GOAL_LOSS)


@dataclass(frozen=True)
class _Output:
    """Directories to write: the merged model, and the adapter if requested, with the name of its base model."""

    model: Path
    adapter: Path | None
    base: str


def _measure_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """The mean loss in nats over all tokens to predict."""
    indices = batch_by_length(examples, rows=16, tokens=max_step_tokens(model))
    batches = [[examples[i] for i in batch] for batch in indices]
    losses = [loss for batch in track(batches, "loss") for loss in token_losses(model, batch)]
    return float(torch.cat(losses).mean())


def _write_merged(trained_model: Any, tokenizer: Any, material: _Material, output: _Output) -> tuple[float, Knowledge]:
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
            probe = first_ids(material.examples)
            merged_model = round_to_bf16(merge_peft_model(trained_model, probe, "method=lora").model)
        # 3. Measure the loss of exactly these weights, and write them only if it is finite.
        loss = _measure_loss(merged_model, material.loss_sample)
        if not math.isfinite(loss):
            raise UserError(f"lr: the loss of the rows is {loss} after training; a smaller rate may help")
        knowledge = measure_knowledge(merged_model, material.knowledge_sample)
        with long_stage("writing", str(output.model)):
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
    out: Path, model: nn.Module, examples: Sequence[Example], *, plan: FinetunePlan, training: Training
) -> Iterator[Path]:
    """Context with the path of a file beside ``out`` for the state of this run; deleted when everything is written.

    Its name has a digest of plan, rows and model, so another run never resumes from it. It holds weights trained on the
    rows, so an interruption logs where it is.
    """
    is_fixed = bool(training.steps or training.epochs)
    rows = [(example.ids, example.roles) for example in examples]
    digest = hashlib.sha256(repr((plan, training.method, is_fixed, rows)).encode())
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
