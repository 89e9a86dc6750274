"""What a decomposition will need: bytes and floating-point operations, from the shape of a model and of its rows.

The formulas stand in docs/scaling.md with what was measured beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WHOLE, KEPT = 8192, 256
"""Vocabulary up to which distributions are kept whole, and the tokens that are kept of a larger one."""
LARGE = 2**25
"""Weights from which on gradients are added up in place, as in ``target.objective``."""
MOMENTS = 2**31
PARTS = 4
"""Parts of a step whose gradients a small model holds at the same time."""
SURROGATE_STEPS, SURROGATE_ROWS = 400, 16
FORGET_ROWS, RETAIN_ROWS = 48, 96


@dataclass(frozen=True)
class Shape:
    """A model: ``layers`` holds (out_features, in_features) of the decomposed ones, ``others`` is the number of other
    weights, ``inputs`` the widths of inputs that differ: query, key and value share one.
    """

    layers: tuple[tuple[int, int], ...]
    others: int
    vocabulary: int
    hidden: int
    blocks: int
    inputs: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Weights that are decomposed."""
        return sum(out * width for out, width in self.layers)

    @property
    def parameters(self) -> int:
        return self.weights + self.others


@dataclass(frozen=True)
class Rows:
    """What is calibrated on: rows, mean tokens of a row, and those of its answer."""

    forget: int
    retain: int
    tokens: float
    answer: float

    @property
    def step(self) -> float:
        """Tokens of one step of attribution or edit."""
        return self.tokens * (min(FORGET_ROWS, self.forget) + min(RETAIN_ROWS, self.retain))


def memory(shape: Shape, rows: Rows, recipe: Any, base_known: bool) -> dict[str, float]:
    """Bytes held at the peak of each stage; ``recipe`` is a ``settings.Recipe``."""
    n, large = shape.weights, shape.weights > LARGE
    model = 4.0 * shape.parameters
    always = model * (2 if base_known else 1) + 2 * n
    lattice = n + 4 * n / recipe.group_size
    kept = shape.vocabulary if shape.vocabulary <= WHOLE else KEPT
    target = rows.forget * rows.answer * (4 * kept if kept == shape.vocabulary else 8 * kept)
    teacher = rows.retain * rows.tokens * (2 * kept if kept == shape.vocabulary else 6 * kept)
    widest = max(out * width for out, width in shape.layers)
    states = 4 if recipe.states == "float32" else 2
    moments = 4.0 * sum(width**2 for width in shape.inputs)
    if moments > MOMENTS:  # block by block, with what every block was given
        moments = moments / shape.blocks + 2 * 4.0 * shape.hidden * rows.retain * rows.tokens
    activations = _activations(shape, rows, recipe.recompute)
    gradients = 4 * n / recipe.groups if large else 4 * n * (PARTS + 1)
    made = rows.forget * rows.answer * 4 * shape.vocabulary * 2
    return {
        "statistics and projection": always + lattice + moments + 24 * widest + 32 * max(shape.inputs) ** 2,
        "target": always + lattice + made + (model + activations if base_known else 0),
        "attribution": always + lattice + target + teacher + 4 * n + gradients + 2 * states * n / recipe.groups
        + activations,
        "edit": always + lattice + target + teacher + n + 28 * recipe.density * n
        + (4 * widest if large else 4 * n * (PARTS + 1)) + activations,
        "streams": always + 2 * lattice + n + recipe.bits / 4 * n + 6 * recipe.density * n,
    }  # fmt: skip


def _activations(shape: Shape, rows: Rows, recompute: bool) -> float:
    """Bytes a backward pass needs: what every layer was given (float32 and BF16), and the logits with their softmax.

    Of a large model one part of a step goes through at a time, at most half of the retain rows. A logit is there in
    BF16 and, with what log-softmax and its gradient take, six times in float32.
    """
    parallel = 1.0 if shape.weights <= LARGE else 0.43
    tokens = rows.step * parallel
    of_blocks = 6.0 * (sum(width for _, width in shape.layers) + 2 * sum(out for out, _ in shape.layers))
    if recompute:
        of_blocks = of_blocks / shape.blocks + 4.0 * shape.hidden * shape.blocks
    return tokens * (of_blocks + 26.0 * shape.vocabulary)


def on_device(shape: Shape, rows: Rows, base_known: bool) -> float:
    """Bytes at the peak on the device of a model that is offloaded: ``memory`` says what the host holds.

    What is no block (also of the base model and of the copy that is taught the retain rows), the weights of a block
    with their gradients, activations as with ``recompute``, and GPTQ of a layer.
    """
    block = 4.0 * shape.weights / shape.blocks
    widest = max(out * width for out, width in shape.layers)
    passing = 2 * block + _activations(shape, rows, recompute=True)
    return 4.0 * shape.others * (3 if base_known else 1) + max(
        passing, block + 24.0 * widest + 32.0 * max(shape.inputs) ** 2
    )


def carried(shape: Shape, recipe: Any) -> float:
    """Bytes that go between host and device for attribution and edit of an offloaded model.

    In a step its weights come twice for each of the parts, and their gradients go once.
    """
    steps = recipe.steps + recipe.groups * max(1, recipe.steps // 10)
    return 3.0 * PARTS * steps * 4 * shape.weights


def work(shape: Shape, rows: Rows, recipe: Any, base_known: bool) -> dict[str, float]:
    """Floating-point operations of each stage, a multiplication and an addition counted as two.

    Those of the projection are in float64.
    """
    pass_forward = 2.0 * (shape.weights + shape.vocabulary * shape.hidden)
    backward = 2.0 * pass_forward + (pass_forward if recipe.recompute else 0.0)
    step = rows.step * (pass_forward + backward)
    every = rows.tokens * (rows.forget + rows.retain)
    moments = 2.0 * rows.tokens * rows.retain * sum(width**2 for width in shape.inputs)
    inverses = sum(5.0 / 3 * width**3 for _, width in shape.layers)
    columns = sum(float(out) * width**2 for out, width in shape.layers)
    swaps = 13.0 * rows.forget * rows.tokens * pass_forward
    surrogate = SURROGATE_STEPS * SURROGATE_ROWS * rows.tokens * (pass_forward + backward) + 2 * every * pass_forward
    return {
        "statistics": rows.retain * rows.tokens * pass_forward + moments,
        "projection (float64)": inverses + columns if recipe.projection != "rtn" else 0.0,
        "target": surrogate if base_known else swaps,
        "teacher": rows.retain * rows.tokens * pass_forward,
        "attribution": recipe.groups * max(1, recipe.steps // 10) * step,
        "edit": recipe.steps * step,
    }


def llama(hidden: int, intermediate: int, blocks: int, vocabulary: int, heads: int, kv_heads: int, tied: bool) -> Shape:
    """The shape of a Llama: all linear layers but the LM head are decomposed."""
    kv = hidden * kv_heads // heads
    block = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    block += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    others = vocabulary * hidden * (1 if tied else 2) + hidden * (2 * blocks + 1)
    inputs = (hidden, hidden, hidden, intermediate) * blocks
    return Shape(tuple(block) * blocks, others, vocabulary, hidden, blocks, inputs)
