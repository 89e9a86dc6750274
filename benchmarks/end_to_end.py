#!/usr/bin/env python
"""Tokens and evaluation requests per second of whole models: plain BF16, and on two streams with each kernel.

    python benchmarks/end_to_end.py --model embedded      # a minute
    python benchmarks/end_to_end.py --model tinyllama     # ten minutes and 10 GB; random weights of that shape

``plain`` is the model before it was decomposed, as ``--model hf`` runs it. A request is the log-likelihood of an
answer of about twenty tokens; tokens are generated greedily, one row at a time. The variants take turns, and every
figure is a median. Written to ``benchmarks/results/`` as JSON.
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
from lm_ortho.bench.layers import device_name
from lm_ortho.layer import alpha_scope, find_linear, get_streams, patch, set_kernel
from lm_ortho.markdown import versions
from lm_ortho.pipeline.build import load_models
from lm_ortho.pipeline.spec import ModelSpec, resolve
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream, bits_per_weight

RESULTS = Path(__file__).parent / "results"
TINYLLAMA = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
PROMPT, ANSWER = 12, 20


def random_streams(weight: torch.Tensor, density: float) -> LayerStreams:
    """A weight rounded to 4 bits in groups of 64, and values on a random support."""
    groups = weight.float().view(weight.shape[0], -1, 64)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).view_as(weight)
    support = torch.rand_like(weight, dtype=torch.float32) < density
    base = BaseStream.from_codes(codes, scales, 4, 64)
    return LayerStreams(base, OrthoStream.from_dense(torch.randn_like(weight, dtype=torch.float32) * 0.01, support))


def tinyllama() -> tuple[nn.Module, nn.Module]:
    """A random model in BF16, and one of the same shape on two streams at 1 %."""
    torch.manual_seed(0)
    with torch.device("meta"):
        plain, own = (LlamaForCausalLM(LlamaConfig(**TINYLLAMA)).to(torch.bfloat16) for _ in range(2))
    for model in (plain, own):
        model.to_empty(device="cpu").eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        model.model.rotary_emb.__init__(model.config)  # its buffers are computed, not stored
    patch(own, {name: random_streams(layer.weight, 0.01) for name, layer in find_linear(own).items()})
    return plain, own


def embedded() -> tuple[nn.Module, nn.Module]:
    """The merged embedded model, and the decomposed one that is shipped."""
    merged, _ = load_models(resolve(ModelSpec(pretrained=None, base="none")))
    return merged.bfloat16().eval(), checkpoint.load(world.path("decomposed"), torch.bfloat16)


def tokens_per_second(model: nn.Module, count: int) -> float:
    """Greedy generation after a short prompt, one row."""
    prompt = torch.arange(5, 5 + PROMPT).unsqueeze(0)
    start = time.perf_counter()
    model.generate(prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return count / (time.perf_counter() - start)


def requests_per_second(model: nn.Module, rows: int) -> float:
    """One batch of prompts with answers through the model and the log-softmax."""
    ids = torch.randint(5, 1000, (rows, PROMPT + ANSWER))
    start = time.perf_counter()
    logits = model(ids).logits.float().log_softmax(-1)
    logits.gather(-1, ids.unsqueeze(-1)).sum().item()
    return rows / (time.perf_counter() - start)


def measure(plain: nn.Module, own: nn.Module, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each variant."""
    sides: list[tuple[str, float, nn.Module]] = [("plain", 0.0, plain)]
    sides += [(kernel, alpha, own) for kernel in ("reference", "cpu") for alpha in (0.0, 1.0)]
    speeds: dict[tuple[str, float], dict[str, list[float]]] = {}
    for round_number in range(asked.rounds + 1):
        for name, alpha, model in sides:
            if model is own:
                set_kernel(own, name)
            kernels.reset_calls()
            with torch.inference_mode(), alpha_scope(alpha):
                took = {"tokens_per_s": tokens_per_second(model, asked.tokens),
                        "requests_per_s": requests_per_second(model, asked.rows)}  # fmt: skip
            if model is own and not all(call.startswith(name) for call in kernels.calls()):
                raise RuntimeError(f"{kernels.calls()} ran in place of {name}")
            if round_number:  # the first makes the operands
                for what, speed in took.items():
                    speeds.setdefault((name, alpha), {}).setdefault(what, []).append(speed)
    return [
        {"variant": name, "alpha": alpha, **{what: round(statistics.median(s), 2) for what, s in by_name.items()}}
        for (name, alpha), by_name in speeds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("embedded", "tinyllama"), default="embedded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    make: Callable[[], tuple[nn.Module, nn.Module]] = {"embedded": embedded, "tinyllama": tinyllama}[asked.model]
    plain, own = make()
    report = {
        "device": device_name(),
        "threads": asked.threads,
        "model": asked.model,
        "dtype": "bfloat16",
        "bits_per_weight": round(bits_per_weight(get_streams(own)), 3),
        "rows": measure(plain, own, asked),
        "date": str(datetime.date.today()),
        "versions": versions(),
    }
    path = RESULTS / f"{report['date']}-end-to-end-{asked.model}-{asked.threads}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["rows"], indent=1))
    print(path)


if __name__ == "__main__":
    main()
