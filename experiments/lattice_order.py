#!/usr/bin/env python
"""What the order of GPTQ is worth, and what it is worth to compute the lattice around the support, at alpha=1.

    python experiments/lattice_order.py --model SmolLM2-135M-Instruct --tofu tofu/ --work work/

``--work`` is a folder of ``tofu_1000.py`` with the model ``published-ours-base-0.01`` (run its stage ``decompose`` and
not yet ``measure``, or that with ``--keep``). Printed are, for every lattice, the mean over the layers of
||(Q - W) X||^2 / ||W X||^2 on the retain rows, and the mean probabilities of the answers of the forget rows and of
every ninth retain row. Decision 39 has the table.
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
from lm_ortho.calibration.by_layer import InputMoments, snapshot_weights
from lm_ortho.config import make_recipe
from lm_ortho.data.encoding import encode
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.layer import find_linear, get_streams
from lm_ortho.markdown import markdown_table
from lm_ortho.projection import PROJECTIONS
from lm_ortho.projection.lattice import compute_scales, dequantise, expand_scales
from lm_ortho.runtime.progress import ProgressBars, show_progress, track

RETAIN_STEP = 9
BITS, GROUP_SIZE = make_recipe().bits, make_recipe().group_size


class LayerLattices:
    """The lattices of one layer: its weight (out, in), the second moments of its inputs (in, in), and its support."""

    def __init__(self, weight: Tensor, moments: Tensor, support: Tensor) -> None:
        self._weight, self._moments, self._support = weight, moments, support
        self._scales = compute_scales(weight, BITS, GROUP_SIZE)

    def project(self, name: str, exact: Tensor | None = None) -> Tensor:
        """The weights of a projection at alpha=1: those of ``exact`` are the original ones."""
        codes = PROJECTIONS.get(name)(
            self._weight, self._scales, self._moments, bits=BITS, group_size=GROUP_SIZE, exact=exact
        )
        return self._restore(dequantise(codes, self._scales, GROUP_SIZE), exact)

    def project_support_first(self, exact: Tensor | None = None) -> Tensor:
        """The same with the columns that have most of the support first."""
        order = self._support.sum(0).argsort(descending=True, stable=True)
        scales = expand_scales(self._scales, GROUP_SIZE, self._weight.shape[1])[:, order]
        codes = PROJECTIONS.get("gptq")(
            self._weight[:, order],
            scales,
            self._moments[order][:, order],
            bits=BITS,
            group_size=1,
            exact=None if exact is None else exact[:, order],
        )
        values = torch.empty_like(self._weight).index_copy_(1, order, codes * scales)
        return self._restore(values, exact)

    def _restore(self, values: Tensor, exact: Tensor | None) -> Tensor:
        return values if exact is None else torch.where(exact, self._weight, values)

    def compute_all(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and the weights of every lattice."""
        generator = torch.Generator().manual_seed(self._support.numel())
        random_support = torch.rand(self._support.shape, generator=generator) < self._support.float().mean()
        plain = self.project("gptq")
        yield "left to right, no support", plain
        yield "the same, support restored", self._restore(plain, self._support)
        yield "left to right, around the support", self.project("gptq", self._support)
        yield "left to right, around as many random weights", self.project("gptq", random_support)
        yield "most of the support first, no support", self.project_support_first()
        yield "most of the support first, around the support", self.project_support_first(self._support)
        yield "largest input first, no support: plain INT4", self.project("gptq_ordered")
        yield "largest input first, around the support: alpha=1", self.project("gptq_ordered", self._support)
        yield "rounded to nearest", self.project("rtn")
        yield "rounded to nearest, support restored", self.project("rtn", self._support)
        yield "merged", self._weight

    def measure_error(self, values: Tensor) -> float:
        """||(Q - W) X||^2 / ||W X||^2."""
        squares = [
            float((w.double() @ self._moments.double() * w).sum()) for w in (values - self._weight, self._weight)
        ]
        return squares[0] / squares[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tofu", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--first", type=int, help="as in tofu_1000.py")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # 1. The rows, in the chat template, and the support of our decomposition.
    tokenizer, rows = AutoTokenizer.from_pretrained(arguments.model), read_tofu(arguments.tofu, arguments.first)
    forget, retain = (encode(tokenizer, render_chat(rows.select(part), tokenizer)) for part in (FORGET, RETAIN))
    streams = get_streams(checkpoint.load(arguments.work / "models" / f"published-{MAIN}"))
    # 2. Every lattice of every layer of the merged model, and its error.
    model = merge_adapter(load_causal_lm(arguments.model), arguments.work / "memory").float().requires_grad_(False)
    layers = find_linear(model)
    weights, moments = snapshot_weights(layers), InputMoments(model, layers, retain)
    lattices, errors = dict[str, dict[str, Tensor]](), dict[str, float]()
    with show_progress(ProgressBars()):
        for layer in track(list(layers), "lattices"):
            weight, ortho = weights[layer], streams[layer].ortho
            support = torch.zeros_like(weight, dtype=torch.bool) if ortho is None else ortho.support()
            layer_lattices = LayerLattices(weight, moments[layer], support)
            for name, values in layer_lattices.compute_all():
                lattices.setdefault(name, {})[layer] = values
                errors[name] = errors.get(name, 0.0) + layer_lattices.measure_error(values) / len(layers)
    # 3. Measure each of them in the place of the merged weights.
    lines = []
    for name, lattice in lattices.items():
        with torch.no_grad():
            for layer, values in lattice.items():
                layers[layer].weight.copy_(values)
        probabilities = (f"{measure_probability(model, part):.3f}" for part in (forget, retain[::RETAIN_STEP]))
        lines.append([name, f"{errors[name]:.5f}", *probabilities])
        print(*lines[-1], flush=True)
    print(markdown_table(["lattice", "error", "forget prob.", "retain prob."], lines))


if __name__ == "__main__":
    main()
