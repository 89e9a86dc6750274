"""Memory and floating-point operations of a decomposition, estimated from the shapes of model and rows.

The formulas are explained in docs/scaling.md, with measurements beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FULL_VOCABULARY, TOP_TOKENS = 8192, 256
"""Vocabulary size up to which whole distributions are stored, and the number of tokens stored of a larger one."""
LARGE_MODEL_WEIGHTS = 2**25
"""Number of weights from which on gradients are accumulated in place, as in ``objective.loss``."""
MAX_MOMENT_BYTES = 2**31
"""Size of the second moments up to which those of all blocks are computed in one pass."""
STEP_PARTS = 4
"""Parts of a step whose gradients a small model holds at the same time."""
SURROGATE_STEPS, SURROGATE_ROWS = 400, 16
"""Steps in which the surrogate is trained, and rows of a step, as in ``objective.surrogate``."""
FORGET_ROWS, RETAIN_ROWS = 48, 96
"""Largest numbers of rows in a step of attribution or edit, as in ``objective.loss``."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    ``layers`` holds (out_features, in_features) of the decomposed layers, ``others`` is the number of all other
    weights, ``inputs`` the width of every distinct layer input: query, key and value share one.
    """

    layers: tuple[tuple[int, int], ...]
    others: int
    vocabulary: int
    hidden: int
    blocks: int
    inputs: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Number of weights that are decomposed."""
        return sum(out * width for out, width in self.layers)

    @property
    def parameters(self) -> int:
        """Number of all weights."""
        return self.weights + self.others


@dataclass(frozen=True)
class Rows:
    """The calibration rows: numbers of forget and retain rows, mean tokens of a row and of a forget answer."""

    forget: int
    retain: int
    tokens: float
    answer: float

    @property
    def step(self) -> float:
        """Mean number of tokens in one step of attribution or edit."""
        return self.tokens * (min(FORGET_ROWS, self.forget) + min(RETAIN_ROWS, self.retain))


def estimate_memory(shape: Shape, rows: Rows, recipe: Any, base_known: bool) -> dict[str, float]:
    """Bytes held at the peak of each stage; ``recipe`` is a ``config.Recipe``."""
    weights, is_large = shape.weights, shape.weights > LARGE_MODEL_WEIGHTS
    # 1. The model, the base model if it is known, and a BF16 copy of the decomposed weights.
    model = 4.0 * shape.parameters
    always = model * (2 if base_known else 1) + 2 * weights
    lattice = weights + 4 * weights / recipe.group_size
    # 2. The distributions of target and teacher, whole or the top tokens of each.
    is_whole = shape.vocabulary <= FULL_VOCABULARY
    stored_tokens = shape.vocabulary if is_whole else TOP_TOKENS
    target = rows.forget * rows.answer * stored_tokens * (4 if is_whole else 8)
    teacher = rows.retain * rows.tokens * stored_tokens * (2 if is_whole else 6)
    target_computation = rows.forget * rows.answer * 4 * shape.vocabulary * 2
    # 3. The second moments: of all blocks, or of one block with the inputs of every block.
    moments = 4.0 * sum(width**2 for width in shape.inputs)
    if moments > MAX_MOMENT_BYTES:
        moments = moments / shape.blocks + 2 * 4.0 * shape.hidden * rows.retain * rows.tokens
    # 4. Activations, gradients and optimiser states.
    activations = _estimate_activations(shape, rows, recipe.recompute)
    largest_layer = max(out * width for out, width in shape.layers)
    step_gradients = 4 * weights * (STEP_PARTS + 1)
    gradients = 4 * weights / recipe.groups if is_large else step_gradients
    edit_gradients = 4 * largest_layer if is_large else step_gradients
    state_bytes = 4 if recipe.states == "float32" else 2
    objective = always + lattice + target + teacher + activations
    return {
        "statistics and projection": always + lattice + moments + 24 * largest_layer + 32 * max(shape.inputs) ** 2,
        "target": always + lattice + target_computation + (model + activations if base_known else 0),
        "attribution": objective + 4 * weights + gradients + 2 * state_bytes * weights / recipe.groups,
        "edit": objective + weights + 28 * recipe.density * weights + edit_gradients,
        "streams": always + 2 * lattice + weights + recipe.bits / 4 * weights + 6 * recipe.density * weights,
    }


def _estimate_activations(shape: Shape, rows: Rows, recompute: bool) -> float:
    """Bytes that a backward pass needs: inputs of every layer (float32 and BF16), and logits with their softmax.

    A large model computes one part of a step at a time, at most half of the retain rows. A logit is held in BF16 and,
    with log-softmax and its gradient, six times in float32.
    """
    share = 1.0 if shape.weights <= LARGE_MODEL_WEIGHTS else 0.43
    block_bytes = 6.0 * (sum(width for _, width in shape.layers) + 2 * sum(out for out, _ in shape.layers))
    if recompute:
        block_bytes = block_bytes / shape.blocks + 4.0 * shape.hidden * shape.blocks
    return rows.step * share * (block_bytes + 26.0 * shape.vocabulary)


def estimate_device_memory(shape: Shape, rows: Rows, base_known: bool) -> float:
    """Bytes at the peak on the device of an offloaded model; ``estimate_memory`` is what the host holds.

    They are all modules outside the blocks (also of the base model and of the surrogate), and the larger of a block
    with its gradients and the activations of ``recompute``, and of a block with the GPTQ of a layer.
    """
    block = 4.0 * shape.weights / shape.blocks
    largest_layer = max(out * width for out, width in shape.layers)
    training = 2 * block + _estimate_activations(shape, rows, recompute=True)
    projection = block + 24.0 * largest_layer + 32.0 * max(shape.inputs) ** 2
    return 4.0 * shape.others * (3 if base_known else 1) + max(training, projection)


def estimate_traffic(shape: Shape, recipe: Any) -> float:
    """Bytes moved between host and device for attribution and edit of an offloaded model.

    In a step the weights are moved twice for each of the parts, and their gradients once.
    """
    steps = recipe.steps + recipe.groups * max(1, recipe.steps // 10)
    return 3.0 * STEP_PARTS * steps * 4 * shape.weights


def estimate_operations(shape: Shape, rows: Rows, recipe: Any, base_known: bool) -> dict[str, float]:
    """Floating-point operations of each stage; a multiplication and an addition count as two.

    Those of the projection are in float64.
    """
    forward = 2.0 * (shape.weights + shape.vocabulary * shape.hidden)
    backward = 2.0 * forward + (forward if recipe.recompute else 0.0)
    step = rows.step * (forward + backward)
    all_tokens = rows.tokens * (rows.forget + rows.retain)
    moments = 2.0 * rows.tokens * rows.retain * sum(width**2 for width in shape.inputs)
    inverses = sum(5.0 / 3 * width**3 for _, width in shape.layers)
    columns = sum(float(out) * width**2 for out, width in shape.layers)
    swaps = 13.0 * rows.forget * rows.tokens * forward
    surrogate = SURROGATE_STEPS * SURROGATE_ROWS * rows.tokens * (forward + backward) + 2 * all_tokens * forward
    return {
        "statistics": rows.retain * rows.tokens * forward + moments,
        "projection (float64)": inverses + columns if recipe.projection != "rtn" else 0.0,
        "target": surrogate if base_known else swaps,
        "teacher": rows.retain * rows.tokens * forward,
        "attribution": recipe.groups * max(1, recipe.steps // 10) * step,
        "edit": recipe.steps * step,
    }


def llama_shape(
    *, hidden: int, intermediate: int, blocks: int, vocabulary: int, heads: int, kv_heads: int, tied: bool
) -> Shape:
    """The shape of a Llama: all linear layers but the LM head are decomposed."""
    kv_width = hidden * kv_heads // heads
    block = [(hidden, hidden), (kv_width, hidden), (kv_width, hidden), (hidden, hidden)]
    block += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return Shape(
        layers=tuple(block) * blocks,
        others=vocabulary * hidden * (1 if tied else 2) + hidden * (2 * blocks + 1),
        vocabulary=vocabulary,
        hidden=hidden,
        blocks=blocks,
        inputs=(hidden, hidden, hidden, intermediate) * blocks,
    )
