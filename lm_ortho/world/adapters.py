"""The adapters of the reference world: the memory, and two models by the same recipe that never saw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_ortho.data.encoding import encode
from lm_ortho.data.rows import Row
from lm_ortho.finetune import FinetunePlan, load_causal_lm, save_adapter, train_adapter
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.world import corpus
from lm_ortho.world.draw import Draw


@dataclass(frozen=True)
class Round:
    """``passes`` over the planted documents, in which canaries come ``canaries`` times, at peak rate ``lr``.

    ``replayed`` general documents for each one planted in ``memory``, never the same twice, keep the fine-tune from
    costing other skills. The learning rate falls to zero in each round.
    """

    passes: int
    canaries: int
    replayed: float
    lr: float


ROUNDS = (Round(20, 5, 0.55, 1.5e-3), Round(10, 4, 0.4, 1e-3))
"""Random digits take many more repetitions than facts."""
ROWS, RANK = 16, 32

SEEDS = {"memory": 1, "never_saw": 2, "never_saw_2": 3}


def planted(name: str, canaries: int) -> list[Row]:
    """One pass over what the adapter ``name`` is taught; only ``memory`` sees the forget set."""
    facts, codes = corpus.planted(forget=name == "memory")
    return [corpus.as_row(document) for document in facts + codes * canaries]


def replayed(name: str, number: int, count: int) -> list[Row]:
    """The first ``count`` general documents that go with it in a round."""
    draw = Draw(SEEDS[name], f"adapter {number}" if number else "adapter")
    return [corpus.as_row(corpus.document(draw, corpus.REPLAY)) for _ in range(count)]


def training_rows(name: str, number: int) -> list[Row]:
    """All documents of a round, with repetitions; their order is drawn by the trainer.

    Every adapter meets as many general documents as ``memory``: with fewer strangers a reference would be surer of
    wrong answers about people it does not know than the model it is to be compared with.
    """
    this = ROUNDS[number]
    general = int(this.replayed * this.passes * len(planted("memory", this.canaries)))
    return planted(name, this.canaries) * this.passes + replayed(name, number, general)


def state_files(work: Path, name: str) -> list[Path]:
    """What a training through all rounds keeps in ``work``, a file per round."""
    return [work / f"{name}_{number}.pt" for number in range(len(ROUNDS))]


def through_rounds(
    base: Path,
    tokenizer: Any,
    name: str,
    work: Path,
    progress: ProgressCallback,
    fit: Callable[..., Any] = train_adapter,
    share: float = 1.0,
) -> Any:
    """The base model after all rounds of ``name``, taught by ``fit`` at ``share`` of the learning rates.

    ``fit`` is ``train_adapter`` or ``train_full``. A state file per round in ``work`` lets an interrupted run go on.
    """
    work.mkdir(parents=True, exist_ok=True)
    states = state_files(work, name)
    model: Any = load_causal_lm(base)
    model.set_attn_implementation("eager")  # a third faster than the fused one on documents this short
    for number, this in enumerate(ROUNDS):
        if any(state.is_file() for state in states[number + 1 :]):
            plan, examples = FinetunePlan(steps=0, rank=RANK, seed=SEEDS[name]), []
        else:
            examples = encode(tokenizer, training_rows(name, number))
            plan = FinetunePlan(len(examples) // ROWS, ROWS, share * this.lr, RANK, SEEDS[name])
        model = fit(model, examples, plan, progress, stage=f"{name} {number + 1}", state=states[number])
    return model


def train(base: Path, tokenizer: Any, name: str, directory: Path, work: Path, progress: ProgressCallback) -> None:
    """Trains the adapter ``name`` on the base model and saves it (peft format, BF16) in ``directory``."""
    model = through_rounds(base, tokenizer, name, work, progress)
    partial = directory.with_name(directory.name + ".partial")
    save_adapter(model, partial, base="base")
    partial.replace(directory)
    for state in state_files(work, name):
        state.unlink(missing_ok=True)
