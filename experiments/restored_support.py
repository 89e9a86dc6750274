#!/usr/bin/env python
"""What it does to a quantised model when single weights become exact again, as those of the support do at alpha=1.

    python experiments/restored_support.py --model SmolLM2-135M-Instruct --tofu tofu/ --work work/

``--work`` is a folder of ``tofu_1000.py`` with the models ``published-int4`` and ``published-ours-base-0.01`` (run its
stage ``decompose`` and not yet ``measure``, or that with ``--keep``). GPTQ chooses each code so that it makes up for
the errors of the ones before it; rounding to nearest does not. Printed are the mean probabilities of the answers of the
forget rows and of every ninth retain row: of the merged model, and of both roundings as they are, with the support
restored, and with as many random weights restored.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tofu1000.adapters import measure_probability
from tofu1000.entries import MAIN
from tofu1000.rows import FORGET, RETAIN, read_tofu, render_chat
from torch import Tensor
from transformers import AutoTokenizer

from lm_ortho import checkpoint
from lm_ortho.data.encoding import encode
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.layer import find_linear, get_streams, unpatch
from lm_ortho.markdown import markdown_table
from lm_ortho.projection.lattice import compute_scales, dequantise, round_to_codes

RETAIN_STEP = 9
BITS, GROUP_SIZE = 4, 64
Weights = dict[str, Tensor]


def round_to_nearest(weights: Weights) -> Weights:
    """Returns the weights rounded to the lattice of the default, each by itself."""
    result = {}
    for name, weight in weights.items():
        scales = compute_scales(weight, BITS, GROUP_SIZE)
        result[name] = dequantise(round_to_codes(weight, scales, BITS, GROUP_SIZE), scales, GROUP_SIZE)
    return result


def restore(quantised: Weights, weights: Weights, support: Weights) -> Weights:
    """Returns the quantised weights, with the exact ones on the support; some layers may have none."""
    return quantised | {name: torch.where(mask, weights[name], quantised[name]) for name, mask in support.items()}


def draw_support(support: Weights, seed: int) -> Weights:
    """Returns random positions, about as many in each layer as the support has."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(mask.shape, generator=generator) < mask.float().mean() for name, mask in support.items()}


def list_variants(weights: Weights, int4: Weights, support: Weights) -> Iterator[tuple[str, Weights]]:
    """Yields the name and the weights of each model that is measured."""
    yield "merged", weights
    for rounding, quantised in (("GPTQ", int4), ("to nearest", round_to_nearest(weights))):
        yield rounding, quantised
        yield f"{rounding}, support restored", restore(quantised, weights, support)
        for seed in (0, 1, 2):
            random_support = draw_support(support, seed)
            yield f"{rounding}, random weights {seed} restored", restore(quantised, weights, random_support)


def read_weights(model: torch.nn.Module) -> Weights:
    """Returns copies of the weights of the linear layers."""
    return {name: layer.weight.detach().float().clone() for name, layer in find_linear(model).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tofu", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--first", type=int, help="as in tofu_1000.py")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # 1. The rows, in the chat template.
    tokenizer, rows = AutoTokenizer.from_pretrained(arguments.model), read_tofu(arguments.tofu, arguments.first)
    forget, retain = (
        encode(tokenizer, render_chat(part, tokenizer))
        for part in (rows.select(FORGET), rows.select(RETAIN)[::RETAIN_STEP])
    )
    # 2. The support of our decomposition, plain INT4, and the merged weights.
    models = arguments.work / "models"
    streams = get_streams(checkpoint.load(models / f"published-{MAIN}"))
    support = {name: layer.ortho.support() for name, layer in streams.items() if layer.ortho is not None}
    int4_model = checkpoint.load(models / "published-int4")
    unpatch(int4_model, alpha=0.0)
    model = merge_adapter(load_causal_lm(arguments.model), arguments.work / "memory").float()
    layers, weights = find_linear(model), read_weights(model)
    # 3. Measure every variant in the place of the merged weights.
    lines = []
    for name, variant in list_variants(weights, read_weights(int4_model), support):
        with torch.no_grad():
            for layer, weight in variant.items():
                layers[layer].weight.copy_(weight)
        lines.append([name, *(f"{measure_probability(model, examples):.3f}" for examples in (forget, retain))])
        print(*lines[-1], flush=True)
    print(markdown_table(["weights", "forget prob.", "retain prob."], lines))


if __name__ == "__main__":
    main()
