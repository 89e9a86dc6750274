#!/usr/bin/env python
"""Measures tokens and evaluation requests per second of full models: plain BF16, and two streams with each kernel.

    python benchmarks/end_to_end.py --model embedded      # a minute
    python benchmarks/end_to_end.py --model tinyllama     # ten minutes and 10 GB; random weights of that shape

``plain`` is the model before decomposition, as ``--model hf`` runs it. A request is the log-likelihood of an answer of
about twenty tokens; tokens are generated greedily, one row at a time. The variants are interleaved, and every figure is
a median. The results go to ``benchmarks/results/`` as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lm_ortho import checkpoint, kernels, world
from lm_ortho.bench.layers import get_device_name
from lm_ortho.config import make_spec
from lm_ortho.layer import alpha_scope, find_linear, get_streams, patch, set_kernel
from lm_ortho.markdown import versions
from lm_ortho.pipeline.loading import load_models
from lm_ortho.pipeline.spec import resolve
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream, bits_per_weight

RESULTS = Path(__file__).parent / "results"
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
PROMPT, ANSWER = 12, 20


def make_random_streams(weight: torch.Tensor, density: float) -> LayerStreams:
    """Rounds a weight to 4 bits in groups of 64, and draws values on a random support."""
    groups = weight.float().view(weight.shape[0], -1, 64)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).view_as(weight)
    support = torch.rand_like(weight, dtype=torch.float32) < density
    base = BaseStream.from_codes(codes, scales, 4, 64)
    return LayerStreams(base, OrthoStream.from_dense(torch.randn_like(weight, dtype=torch.float32) * 0.01, support))


def make_tinyllama() -> tuple[nn.Module, nn.Module]:
    """Makes a random model in BF16, and one of the same shape on two streams at 1 %."""
    torch.manual_seed(0)
    with torch.device("meta"):
        plain, decomposed_model = (LlamaForCausalLM(LlamaConfig(**TINYLLAMA)).to(torch.bfloat16) for _ in range(2))
    for model in (plain, decomposed_model):
        model.to_empty(device="cpu").eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        model.model.rotary_emb.__init__(model.config)  # its buffers are no parameters
    layers = find_linear(decomposed_model)
    patch(decomposed_model, {name: make_random_streams(layer.weight, 0.01) for name, layer in layers.items()})
    return plain, decomposed_model


def load_embedded() -> tuple[nn.Module, nn.Module]:
    """Loads the merged embedded model, and the decomposed one that is shipped."""
    merged_model, _ = load_models(resolve(make_spec(base="none")))
    return merged_model.bfloat16().eval(), checkpoint.load(world.get_path("decomposed"), torch.bfloat16)


def measure_tokens_per_second(model: Any, count: int) -> float:
    """Measures greedy generation of one row after a short prompt."""
    prompt = torch.arange(5, 5 + PROMPT).unsqueeze(0)
    start = time.perf_counter()
    model.generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return count / (time.perf_counter() - start)


def measure_requests_per_second(model: nn.Module, rows: int) -> float:
    """Measures the log-softmax of the model on one batch of prompts with answers."""
    ids = torch.randint(5, 1000, (rows, PROMPT + ANSWER))
    start = time.perf_counter()
    logits = model(ids).logits.float().log_softmax(-1)
    logits.gather(-1, ids.unsqueeze(-1)).sum().item()
    return rows / (time.perf_counter() - start)


def measure(plain: nn.Module, decomposed_model: nn.Module, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every variant; returns a row for each."""
    variants: list[tuple[str, float, nn.Module]] = [("plain", 0.0, plain)]
    variants += [(kernel, alpha, decomposed_model) for kernel in ("reference", "cpu") for alpha in (0.0, 1.0)]
    speeds: dict[tuple[str, float], dict[str, list[float]]] = {}
    for round_number in range(arguments.rounds + 1):
        for name, alpha, model in variants:
            if model is decomposed_model:
                set_kernel(decomposed_model, name)
            kernels.reset_calls()
            with torch.inference_mode(), alpha_scope(alpha):
                figures = {
                    "tokens_per_s": measure_tokens_per_second(model, arguments.tokens),
                    "requests_per_s": measure_requests_per_second(model, arguments.rows),
                }
            if model is decomposed_model and not all(call.startswith(name) for call in kernels.calls()):
                raise RuntimeError(f"{kernels.calls()} ran in place of {name}")
            if round_number:  # the first round builds the operands
                for figure, speed in figures.items():
                    speeds.setdefault((name, alpha), {}).setdefault(figure, []).append(speed)
    return [
        {"variant": name, "alpha": alpha, **{figure: round(statistics.median(s), 2) for figure, s in by_name.items()}}
        for (name, alpha), by_name in speeds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "tinyllama"), default="embedded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    make: Callable[[], tuple[nn.Module, nn.Module]] = {"embedded": load_embedded, "tinyllama": make_tinyllama}[
        arguments.model
    ]
    plain, decomposed_model = make()
    report = {
        "device": get_device_name(),
        "threads": arguments.threads,
        "model": arguments.model,
        "dtype": "bfloat16",
        "bits_per_weight": round(bits_per_weight(get_streams(decomposed_model)), 3),
        "rows": measure(plain, decomposed_model, arguments),
        "date": str(datetime.date.today()),
        "versions": versions(),
    }
    path = RESULTS / f"{report['date']}-end-to-end-{arguments.model}-{arguments.threads}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["rows"], indent=1))
    print(path)


if __name__ == "__main__":
    main()
