#!/usr/bin/env python
"""Measures memory and time of a decomposition on a random Llama, beside the estimates of the formulas.

The formulas are in ``lm_ortho.pipeline.resource_estimate``.

    python benchmarks/scaling.py --shape small                       # 0.05 G weights, minutes
    python benchmarks/scaling.py --shape smollm2 --steps 10 --base   # that of SmolLM2-135M, with a base model
    python benchmarks/scaling.py --shape tinyllama --steps 30 --forget 8 --retain 64 \\
        --groups 2 --states bfloat16 --recompute                     # 1.1 G parameters, more than an hour on 2 cores

Weights and words are random: the figures show the time and memory of a decomposition, nothing about forgetting. The
results go to ``benchmarks/results/`` as JSON.
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

from lm_ortho.config import count_sieve_steps, make_recipe
from lm_ortho.data import Row
from lm_ortho.markdown import versions
from lm_ortho.pipeline import resource_estimate
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime.progress import ProgressBars

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 128, "intermediate": 384, "blocks": 4, "vocabulary": 4096, "heads": 4, "kv_heads": 4},
    "small": {"hidden": 512, "intermediate": 1408, "blocks": 16, "vocabulary": 32000, "heads": 8, "kv_heads": 2},
    "smollm2": {"hidden": 576, "intermediate": 1536, "blocks": 30, "vocabulary": 49152, "heads": 9, "kv_heads": 3},
    "tinyllama": {"hidden": 2048, "intermediate": 5632, "blocks": 22, "vocabulary": 32000, "heads": 32, "kv_heads": 4},
}
TIED = ("smollm2",)
"""Shapes whose output embedding is the input embedding."""
QUESTION, ANSWER = 10, 6
"""Words of a question and of an answer; every word is one token."""


def make_model(
    *,
    hidden: int,
    intermediate: int,
    blocks: int,
    vocabulary: int,
    heads: int,
    kv_heads: int,
    tied: bool,
    seed: int = 0,
) -> Any:
    """Makes random weights with BF16 values in float32, one parameter at a time so that there is no second copy."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def make_tokenizer(vocabulary: int) -> Any:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", bos_token="w0", pad_token="w1")


def make_rows(count: int, vocabulary: int, rng: random.Random) -> list[Row]:
    def draw_words(number: int) -> str:
        return " ".join(f"w{rng.randrange(10, vocabulary)}" for _ in range(number))

    return [Row(question=draw_words(QUESTION), answer=draw_words(ANSWER), subject=draw_words(1)) for _ in range(count)]


class Monitor:
    """A progress callback that measures the seconds and the peak resident memory of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, int] = defaultdict(int)
        self._stage, self._last_time, self.forecast = "start", time.perf_counter(), ""
        self._progress, self._is_running = ProgressBars(), True
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        process = psutil.Process()
        while self._is_running:
            self.bytes[self._stage] = max(self.bytes[self._stage], process.memory_info().rss)
            time.sleep(0.02)

    def __call__(self, stage: str, step: int, steps: int, text: str) -> None:
        """Adds the time since the last call to the stage that reports."""
        now = time.perf_counter()
        self._stage = stage.split(" ")[0]
        if stage == "memory":
            self.forecast = text
        self.seconds[self._stage] += now - self._last_time
        self._last_time = now
        self._progress(stage, step, steps, text)

    def stop(self) -> None:
        self("streams", 1, 1, "")
        self._is_running = False
        self._thread.join()


def main() -> None:
    """Measures once and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--forget", type=int, default=16)
    parser.add_argument("--retain", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--states", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--base", action="store_true", help="give a base model, so that a surrogate is trained")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    dimensions = {**SHAPES[arguments.shape], "tied": arguments.shape in TIED}
    recipe = make_recipe(
        steps=arguments.steps,
        groups=arguments.groups,
        states=arguments.states,
        recompute=arguments.recompute,
        prompts="plain",
    )
    rng = random.Random(0)
    forget, retain = (make_rows(count, dimensions["vocabulary"], rng) for count in (arguments.forget, arguments.retain))
    tokenizer, memory_before = make_tokenizer(dimensions["vocabulary"]), psutil.Process().memory_info().rss
    model, monitor, start_time = make_model(**dimensions), Monitor(), time.perf_counter()
    base_model = make_model(**dimensions, seed=1) if arguments.base else None
    decomposition = decompose(model, tokenizer, forget, retain, recipe, base_model=base_model, progress=monitor)
    monitor.stop()
    tokens = QUESTION + ANSWER + 4  # "Question:", "Answer:" and the end token; the line break is none
    shape = resource_estimate.llama_shape(**dimensions)
    rows = resource_estimate.Rows(arguments.forget, arguments.retain, tokens, ANSWER + 1)
    steps = {"attribution": count_sieve_steps(arguments.steps) * arguments.groups, "edit": arguments.steps}
    operations = resource_estimate.estimate_operations(shape, rows, recipe, base_known=arguments.base)
    memory = resource_estimate.estimate_memory(shape, rows, recipe, arguments.base, overhead=memory_before)
    report = {
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "command": " ".join(["python benchmarks/scaling.py", *_format_options(arguments)]),
        "weights": shape.weights,
        "parameters": shape.parameters,
        "density_reached": decomposition.report["density_reached"],
        "seconds": {"all": round(time.perf_counter() - start_time, 1), **_round_values(monitor.seconds, 1)},
        "seconds_per_step": {stage: round(monitor.seconds[stage] / count, 3) for stage, count in steps.items()},
        "gigaflops": {stage: round(operations[stage] / monitor.seconds[stage] / 1e9, 1) for stage in steps},
        "overhead_gb": round(memory_before / 1e9, 3),
        "peak_gb": _round_values({stage: size / 1e9 for stage, size in monitor.bytes.items()}, 3),
        "formula_gb": _round_values({stage: size / 1e9 for stage, size in memory.items()}, 3),
        "forecast": monitor.forecast,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    lean = arguments.recompute or arguments.groups > 1 or arguments.states != "float32"
    kind = ("-base" if arguments.base else "") + ("-lean" if lean else "")
    name = f"{report['date']}-scaling-{arguments.shape}{kind}.json"
    (arguments.out / name).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def _round_values(values: dict[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in values.items()}


def _format_options(arguments: argparse.Namespace) -> list[str]:
    options = {name: value for name, value in vars(arguments).items() if name != "out" and value is not False}
    return [f"--{name}" if value is True else f"--{name} {value}" for name, value in options.items()]


if __name__ == "__main__":
    main()
