"""Adapters of the embedded world: the memory, and two retain-only adapters by the same recipe."""

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
from lm_ortho.world.draw import SeededRandom


@dataclass(frozen=True)
class Round:
    """One round of an adapter's training; the learning rate falls to zero in each round.

    A round makes ``passes`` passes over the planted documents, with every canary repeated ``canary_repetitions`` times
    in each pass, at the peak learning rate ``lr``. For each document planted in ``memory``, ``replay_share`` general
    documents are mixed in, never the same one twice, so that the fine-tune does not cost other skills.
    """

    passes: int
    canary_repetitions: int
    replay_share: float
    lr: float


ROUNDS = (Round(20, 5, 0.55, 1.5e-3), Round(10, 4, 0.4, 1e-3))
"""The rounds of every adapter. Random digits take many more repetitions than facts."""
BATCH_ROWS, RANK = 16, 32

SEEDS = {"memory": 1, "never_saw": 2, "never_saw_2": 3}


def make_planted_rows(name: str, canary_repetitions: int) -> list[Row]:
    """Returns one pass over what the adapter ``name`` is taught; only ``memory`` sees the forget set."""
    facts, codes = corpus.make_planted_documents(forget=name == "memory")
    return [corpus.to_row(document) for document in facts + codes * canary_repetitions]


def draw_replay_rows(name: str, number: int, count: int) -> list[Row]:
    """Draws the first ``count`` general documents that the adapter ``name`` sees in the round ``number``."""
    rng = SeededRandom(SEEDS[name], f"adapter {number}" if number else "adapter")
    return [corpus.to_row(corpus.draw_document(rng, corpus.REPLAY)) for _ in range(count)]


def make_training_rows(name: str, number: int) -> list[Row]:
    """Returns all documents of the round ``number``, with repetitions; the trainer draws their order.

    Every adapter sees as many general documents as ``memory``: with fewer strangers, a retain-only model would be more
    certain of wrong answers about people it does not know than the model it is compared with.
    """
    plan = ROUNDS[number]
    count = int(plan.replay_share * plan.passes * len(make_planted_rows("memory", plan.canary_repetitions)))
    return make_planted_rows(name, plan.canary_repetitions) * plan.passes + draw_replay_rows(name, number, count)


def list_state_files(work: Path, name: str) -> list[Path]:
    """Returns the state files that a training through all rounds writes to ``work``, one per round."""
    return [work / f"{name}_{number}.pt" for number in range(len(ROUNDS))]


def train_rounds(
    base: Path,
    tokenizer: Any,
    name: str,
    work: Path,
    progress: ProgressCallback,
    *,
    fit: Callable[..., Any] = train_adapter,
    share: float = 1.0,
) -> Any:
    """Trains the base model through all rounds of ``name`` and returns it.

    ``fit`` is ``train_adapter`` or ``train_full``; ``share`` scales the learning rates. A state file per round in
    ``work`` lets an interrupted run resume.
    """
    work.mkdir(parents=True, exist_ok=True)
    states = list_state_files(work, name)
    model: Any = load_causal_lm(base)
    model.set_attn_implementation("eager")  # a third faster than fused attention on documents this short
    for number, training_round in enumerate(ROUNDS):
        # A state of a later round exists: this round is finished and only its weights are loaded.
        if any(state.is_file() for state in states[number + 1 :]):
            plan, examples = FinetunePlan(steps=0, rank=RANK, seed=SEEDS[name]), []
        else:
            examples = encode(tokenizer, make_training_rows(name, number))
            lr = share * training_round.lr
            plan = FinetunePlan(len(examples) // BATCH_ROWS, BATCH_ROWS, lr=lr, rank=RANK, seed=SEEDS[name])
        model = fit(model, examples, plan, progress, stage=f"{name} {number + 1}", state=states[number])
    return model


def train(base: Path, tokenizer: Any, name: str, *, directory: Path, work: Path, progress: ProgressCallback) -> None:
    """Trains the adapter ``name`` on the base model and saves it (peft format, BF16) in ``directory``.

    ``work`` holds the training state until then.
    """
    model = train_rounds(base, tokenizer, name, work, progress)
    partial = directory.with_name(directory.name + ".partial")
    save_adapter(model, partial, base="base")
    partial.replace(directory)
    for state in list_state_files(work, name):
        state.unlink(missing_ok=True)
