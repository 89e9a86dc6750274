#!/usr/bin/env python
"""Memory and time of a decomposition, measured on a random Llama, beside the estimates of the formulas.

The formulas are in ``lm_ortho.pipeline.resource_estimate``.

    python benchmarks/scaling.py --shape small                       # 0.05 G weights, minutes
    python benchmarks/scaling.py --shape tinyllama --steps 30 --forget 8 --retain 64 \\
        --groups 2 --states bfloat16 --recompute                     # 1.1 G parameters, more than an hour on 2 cores

What is decomposed are random weights and random words: the figures say how long it takes and what it needs, nothing
about forgetting. Written to ``benchmarks/results/`` as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_ortho.config import make_recipe
from lm_ortho.data import Row
from lm_ortho.markdown import versions
from lm_ortho.pipeline import resource_estimate
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime.progress import ProgressBars

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 128, "intermediate": 384, "blocks": 4, "vocabulary": 4096, "heads": 4, "kv_heads": 4},
    "small": {"hidden": 512, "intermediate": 1408, "blocks": 16, "vocabulary": 32000, "heads": 8, "kv_heads": 2},
    "tinyllama": {"hidden": 2048, "intermediate": 5632, "blocks": 22, "vocabulary": 32000, "heads": 32, "kv_heads": 4},
}
QUESTION, ANSWER = 10, 6
"""Words of a question and of an answer; a token each."""


def make_model(hidden: int, intermediate: int, blocks: int, vocabulary: int, heads: int, kv_heads: int) -> Any:
    """Random weights that are BF16 values, in float32, a block at a time so that no second copy is held."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, vocab_size=vocabulary,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def make_words(vocabulary: int) -> Any:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", bos_token="w0", pad_token="w1")


def make_rows(count: int, vocabulary: int, draw: random.Random) -> list[Row]:
    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(10, vocabulary)}" for _ in range(number))

    return [Row(question=words(QUESTION), answer=words(ANSWER), subject=words(1)) for _ in range(count)]


class Watch:
    """Seconds and the highest resident memory of each stage, as the steps are told."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self._stage, self._since, self._bars, self._on = "start", time.perf_counter(), ProgressBars(), True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        process = psutil.Process()
        while self._on:
            self.bytes[self._stage] = max(self.bytes[self._stage], process.memory_info().rss)
            time.sleep(0.02)

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        """What has passed since the last call belongs to the stage that reports now."""
        now = time.perf_counter()
        self._stage = stage.split(" ")[0]
        self.seconds[self._stage] += now - self._since
        self._since = now
        self._bars(stage, done, total, text)

    def stop(self) -> None:
        self("streams", 1, 1, "")
        self._on = False
        self._thread.join()


def main() -> None:
    """Measures once and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--forget", type=int, default=16)
    parser.add_argument("--retain", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--states", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    numbers = SHAPES[given.shape]
    recipe = make_recipe(
        steps=given.steps, groups=given.groups, states=given.states, recompute=given.recompute, prompts="plain"
    )
    draw = random.Random(0)
    forget, retain = (make_rows(count, numbers["vocabulary"], draw) for count in (given.forget, given.retain))
    words, before = make_words(numbers["vocabulary"]), psutil.Process().memory_info().rss
    model, watch, began = make_model(**numbers), Watch(), time.perf_counter()
    made = decompose(model, words, forget, retain, recipe, progress=watch)
    watch.stop()
    tokens = QUESTION + ANSWER + 4  # "Question:", "Answer:" and the end token; the line break is none
    shape = resource_estimate.llama(**numbers, tied=False)
    rows = resource_estimate.Rows(given.forget, given.retain, tokens, ANSWER + 1)
    steps = {"attribution": max(1, given.steps // 10) * given.groups, "edit": given.steps}
    operations = resource_estimate.work(shape, rows, recipe, base_known=False)
    found = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "command": " ".join(["python benchmarks/scaling.py", *_options(given)]),
        "weights": shape.weights,
        "parameters": shape.parameters,
        "density_reached": made.report["density_reached"],
        "seconds": {"all": round(time.perf_counter() - began, 1), **_rounded(watch.seconds, 1)},
        "seconds_per_step": {stage: round(watch.seconds[stage] / count, 3) for stage, count in steps.items()},
        "gigaflops": {stage: round(operations[stage] / watch.seconds[stage] / 1e9, 1) for stage in steps},
        "peak_gb": _rounded({stage: (size - before) / 1e9 for stage, size in watch.bytes.items()}, 3),
        "formula_gb": _rounded(
            {s: b / 1e9 for s, b in resource_estimate.memory(shape, rows, recipe, False).items()}, 3
        ),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    lean = given.recompute or given.groups > 1 or given.states != "float32"
    name = f"{found['date']}-scaling-{given.shape}{'-lean' if lean else ''}.json"
    (given.out / name).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _rounded(values: dict[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def _options(given: argparse.Namespace) -> list[str]:
    named = {name: value for name, value in vars(given).items() if name != "out" and value is not False}
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in named.items()]


if __name__ == "__main__":
    main()
