#!/usr/bin/env python
"""Measures the CPU time of a step of ``lm-ortho implant`` beside that of a plain training loop, step by step in turn.

    OMP_NUM_THREADS=1 python benchmarks/implant.py --shape smollm2 --steps 4     # random weights of that shape; minutes
    OMP_NUM_THREADS=1 python benchmarks/implant.py --shape embedded --steps 30   # seconds

The plain loop is what a user of transformers and peft writes: LoRA of the same rank on the same layers with the same
initial weights, ``torch.optim.AdamW``, the same rows in each step, padded per batch, and the loss that the model
computes from ``labels``. Both are float32 on a CPU without BF16 products. Time is that of the process, all threads
together, so other processes on the machine count little. The first step of each is left out. The results go to
``benchmarks/results/`` as JSON.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lm_ortho import world
from lm_ortho.data.encoding import ANSWER, CONTEXT, Example, encode
from lm_ortho.finetune import FinetunePlan, load_causal_lm, load_tokenizer, train_adapter
from lm_ortho.finetune.lora import find_lora_targets
from lm_ortho.finetune.train import draw_batches
from lm_ortho.markdown import versions
from lm_ortho.world import corpus

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
QUESTION, ANSWER_TOKENS = (15, 30), (15, 60)
"""Range of tokens of a question with its frame, and of an answer; those of TOFU."""
RANK, LEARNING_RATE, SEED = 32, 1e-3, 0


def make_smollm2() -> tuple[nn.Module, list[Example]]:
    """A random Llama of SmolLM2-135M's shape, and 64 rows of random tokens."""
    torch.manual_seed(0)
    rng, vocabulary = random.Random(0), SMOLLM2["vocab_size"]
    examples = []
    for _ in range(64):
        question, answer = rng.randint(*QUESTION), rng.randint(*ANSWER_TOKENS)
        ids = tuple(rng.randrange(10, vocabulary) for _ in range(question + answer))
        examples.append(Example(ids, (CONTEXT,) * question + (ANSWER,) * answer))
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval(), examples


def load_embedded() -> tuple[nn.Module, list[Example]]:
    """The embedded base model and its forget rows."""
    base = world.get_path("base")
    return load_causal_lm(base), encode(load_tokenizer(base), corpus.make_forget_rows())


class PlainLoop:
    """The training loop that implant is compared with."""

    def __init__(self, model: nn.Module, examples: Sequence[Example], rows: int) -> None:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=find_lora_targets(model), task_type="CAUSAL_LM")
        torch.manual_seed(SEED)
        self._model: Any = get_peft_model(copy.deepcopy(model), config).train()
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimiser = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
        self._examples, self._batches = examples, draw_batches(examples, rows, random.Random(SEED))

    def take_step(self) -> float:
        """Trains on the next batch and returns its loss."""
        batch = [self._examples[i] for i in next(self._batches)]
        width = max(len(example.ids) for example in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, example in enumerate(batch):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            mask[row, : len(example.ids)] = 1
            targets = torch.tensor(
                [token if role else -100 for token, role in zip(example.ids, example.roles, strict=True)]
            )
            labels[row, : len(example.ids)] = targets
        loss = self._model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        self._optimiser.step()
        self._optimiser.zero_grad()
        return loss.item()


class Interleaved:
    """A progress callback of our loop: after each of our steps it takes one of the plain loop, and times both."""

    def __init__(self, plain_loop: PlainLoop) -> None:
        self._plain_loop = plain_loop
        self.ours: list[float] = []
        self.plain: list[float] = []
        self.losses: list[tuple[float, float]] = []
        self._step, self._start = 0, time.process_time()

    def __call__(self, stage: str, step: int, steps: int, text: str) -> None:
        """Books the time since the last call to our steps, and takes as many of the plain loop."""
        count, middle = step - self._step, time.process_time()
        self.ours.append((middle - self._start) / count)
        loss = [self._plain_loop.take_step() for _ in range(count)][-1]
        self._step, self._start = step, time.process_time()
        self.plain.append((self._start - middle) / count)
        self.losses.append((float(text.rpartition(" ")[2]), round(loss, 3)))
        print(f"step {step} of {steps}: ours {self.ours[-1]:.2f} s, plain {self.plain[-1]:.2f} s, {text}", flush=True)


def main() -> None:
    """Measures once and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("smollm2", "embedded"), default="smollm2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step; fewer need less memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    model, examples = make_smollm2() if arguments.shape == "smollm2" else load_embedded()
    plan = FinetunePlan(arguments.steps + 1, arguments.rows, LEARNING_RATE, rank=RANK, seed=SEED)
    measurement = Interleaved(PlainLoop(model, examples, arguments.rows))
    train_adapter(model, examples, plan, measurement, in_place=True)
    ours, plain = measurement.ours[1:], measurement.plain[1:]
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "command": f"python benchmarks/implant.py --shape {arguments.shape} --steps {arguments.steps} "
        f"--rows {arguments.rows}",
        "model": {name: getattr(model.config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")},
        "batch": {
            "rows": arguments.rows,
            "mean_tokens": round(statistics.fmean(len(example.ids) for example in examples), 1),
        },
        "rank": RANK,
        "cpu_seconds_per_step": {"implant": _summarise(ours), "plain": _summarise(plain)},
        "ratio": round(statistics.median(one / other for one, other in zip(ours, plain, strict=True)), 3),
        "first_losses": dict(zip(("implant", "plain"), measurement.losses[0], strict=True)),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{report['date']}-implant-{arguments.shape}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def _summarise(seconds: Sequence[float]) -> dict[str, float]:
    summary = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: round(value, 3) for name, value in summary.items()}


if __name__ == "__main__":
    main()
