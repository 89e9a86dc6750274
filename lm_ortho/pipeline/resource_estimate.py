"""Memory and floating-point operations of a decomposition, estimated from the shapes of model and rows.

The formulas are explained in docs/scaling.md, with measurements beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lm_ortho.config import count_sieve_steps

FULL_VOCABULARY, TOP_TOKENS = 8192, 256
"""Vocabulary size up to which whole distributions are stored, and the number of tokens stored of a larger one."""
LARGE_MODEL_WEIGHTS = 2**25
"""Number of weights from which on gradients are accumulated in place, as in ``objective.loss``."""
MAX_MOMENT_BYTES, SMALL_MOMENT_BYTES = 2**31, 2**26
"""Size of the second moments up to which those of all blocks are computed in one pass, and up to which they stay."""
STEP_PARTS = 4
"""Parts of a step whose gradients a small model holds at the same time."""
FORGET_ROWS = 12
"""Largest number of forget rows in a step of attribution or edit by default; there are twice as many retain rows."""
ACTIVATION_BYTES, PART_LOGITS, CHUNK_LOGITS = 2**30, 2**25, 2**23
"""Budgets of a part of a step: bytes of activations, unless a quarter of the model is more; logits; and the logits
whose log-probabilities are held at the same time."""
OFFLOADED_BUDGETS = 8
"""Factor of these budgets for an offloaded model."""
CHUNK_PROBABILITIES, PREDICTION_TOKENS = 2**25, 4096
"""Probabilities of a chunk of target rows, and tokens of a batch of predictions, as in ``objective.distribution``."""
SURROGATE_TOKENS, SURROGATE_BUDGET, SURROGATE_RANK = 1024, 1.0, 16
"""Tokens of a step of the surrogate, its largest number of tokens as a share of those of the edit, and the rank of its
adapter, as in ``objective.surrogate_training``."""
SWAPPED_NAMES, NAME_TRIALS = 12, 96
"""Names that the swap target averages over, and those that it tries, as in ``objective.swap``."""
METRIC_ROWS = 256
"""Retain rows from which the coordinates of the edit are computed if the moments of all are not stored, as in
``pipeline.workbench``."""
BASIS_POSITIONS = 64
"""Mean width of the bases of the edit (``edit.input_metric``, at most 128), for each position of the support."""
HELD_SHARE = 0.75
"""Share of the inputs of all layers and of twice their outputs that autograd holds, measured on Llamas."""
OVERHEAD = 0.7e9
"""Bytes of the interpreter, of PyTorch and of the other libraries on a CPU."""


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

    @property
    def moment_bytes(self) -> float:
        """Bytes of the second moments of all layer inputs."""
        return 4.0 * sum(width**2 for width in self.inputs)

    @property
    def has_small_moments(self) -> bool:
        """Whether the second moments stay in memory: as if no two layers shared an input, like ``InputMoments``."""
        return 4 * sum(width**2 for _, width in self.layers) <= SMALL_MOMENT_BYTES


@dataclass(frozen=True)
class Rows:
    """The calibration rows: numbers of forget and retain rows, mean tokens of a row and of a forget answer."""

    forget: int
    retain: int
    tokens: float
    answer: float
    batch_rows: int = FORGET_ROWS

    @property
    def step_rows(self) -> tuple[int, int]:
        """Numbers of forget and of retain rows in one step of attribution or edit."""
        return min(self.batch_rows, self.forget), min(2 * self.batch_rows, self.retain)

    @property
    def step(self) -> float:
        """Mean number of tokens in one step of attribution or edit."""
        return self.tokens * sum(self.step_rows)


def estimate_memory(
    shape: Shape, rows: Rows, recipe: Any, base_known: bool, overhead: float = OVERHEAD
) -> dict[str, float]:
    """Bytes held at the peak of each stage by the whole process; ``recipe`` is a ``config.Recipe``.

    ``overhead`` is what the process holds beside the model.
    """
    weights, is_large = shape.weights, shape.weights > LARGE_MODEL_WEIGHTS
    largest_layer = max(out * width for out, width in shape.layers)
    # 1. The model, the base model if it is known, a BF16 copy of the decomposed weights, and the scales.
    prepared = overhead + 4.0 * shape.parameters * (2 if base_known else 1) + 2 * weights
    prepared += 4 * weights / recipe.group_size
    # 2. The second moments, where they stay: of all blocks, or of one block with the inputs of every block.
    moments = _estimate_moments(shape, rows.retain * rows.tokens)
    stored_moments = moments if shape.has_small_moments else 0
    # 3. The distributions of target and teacher, whole or the top tokens of each.
    is_whole = shape.vocabulary <= FULL_VOCABULARY
    stored_tokens = shape.vocabulary if is_whole else TOP_TOKENS
    target = rows.forget * rows.answer * stored_tokens * (4 if is_whole else 8)
    teacher = rows.retain * rows.tokens * stored_tokens * (2 if is_whole else 6)
    # 4. Passes without gradients: the widest layers of a block, and a few copies of the distributions of a chunk.
    prediction = min(PREDICTION_TOKENS, rows.tokens * rows.forget * SWAPPED_NAMES) * 16.0 * max(shape.inputs)
    chunk = min(CHUNK_PROBABILITIES, rows.forget * rows.answer * shape.vocabulary)
    names = 0 if base_known else 4.0 * shape.vocabulary * shape.hidden
    target_computation = max(16.0 * chunk + prediction, names)
    # 5. Gradients and optimiser states.
    step = _estimate_step_activations(shape, rows, recipe.recompute)
    gradients = 4 * weights / recipe.groups if is_large else 4 * weights * (STEP_PARTS + 1)
    state_bytes = 4 if recipe.states == "float32" else 2
    support = recipe.density * weights
    objective = prepared + target + teacher + step
    # 6. The lattice around the support: codes, masks, the moments, and the GPTQ of one layer.
    lattice = prepared + target + teacher + 2 * weights
    projection = lattice + moments + 24 * largest_layer + 32 * max(shape.inputs) ** 2
    # 7. The bases of the edit; the moments that they are made from are released before the first step.
    metric_moments = _estimate_moments(shape, min(METRIC_ROWS, rows.retain) * rows.tokens)
    bases = 4.0 * BASIS_POSITIONS * support
    edited = lattice + stored_moments + weights
    return {
        "target": prepared + target + max(target_computation, estimate_surrogate(shape) if base_known else 0),
        "attribution": objective + 4 * weights + gradients + 2 * state_bytes * weights / recipe.groups,
        "statistics and projection": projection,
        "edit": edited + max(step, metric_moments) + bases + 60 * support,
        "streams": edited + recipe.bits / 4 * weights + 6 * support,
    }


def _estimate_moments(shape: Shape, tokens: float) -> float:
    """Bytes of the second moments that are held at the same time, with the inputs and outputs of a block for them."""
    if shape.moment_bytes <= MAX_MOMENT_BYTES:
        return shape.moment_bytes
    return shape.moment_bytes / shape.blocks + 2 * 4.0 * shape.hidden * tokens


def _token_bytes(shape: Shape) -> float:
    """Bytes of the inputs of all layers and of twice their outputs, in float32, for a token."""
    return 4.0 * sum(width + 2 * out for out, width in shape.layers)


def _part_tokens(shape: Shape, rows: Rows, recompute: bool, budgets: int = 1) -> tuple[float, float]:
    """Tokens of the largest part of a step, and bytes of its activations for each of them."""
    token_bytes = _token_bytes(shape)
    if recompute:
        token_bytes = token_bytes / shape.blocks + 4.0 * shape.hidden * shape.blocks
    budget = budgets * max(ACTIVATION_BYTES, shape.parameters) / token_bytes  # a quarter of the model in float32
    # A small model computes the parts side by side; otherwise the largest is about the longer half of the retain rows.
    share = 1.0 if shape.weights <= LARGE_MODEL_WEIGHTS else 0.43
    return max(rows.tokens, min(rows.step * share, budget, budgets * PART_LOGITS / shape.vocabulary)), token_bytes


def _estimate_step_activations(shape: Shape, rows: Rows, recompute: bool, budgets: int = 1) -> float:
    """Bytes that a part of a step needs: activations, the logits with their gradient, and those of a chunk of them.

    ``budgets`` is the factor of the largest part of a step.
    """
    tokens, token_bytes = _part_tokens(shape, rows, recompute, budgets)
    logits = tokens * shape.vocabulary
    return HELD_SHARE * tokens * token_bytes + 8.0 * logits + 16.0 * min(logits, CHUNK_LOGITS)


def estimate_surrogate(shape: Shape) -> float:
    """Bytes that training the surrogate needs beside the base model: adapter, its Adam states, activations, logits."""
    adapter = 16.0 * SURROGATE_RANK * sum(out + width for out, width in shape.layers)
    token_bytes = _token_bytes(shape) + 12.0 * shape.vocabulary
    budget = max(ACTIVATION_BYTES, shape.parameters)
    return adapter + HELD_SHARE * min(SURROGATE_TOKENS * token_bytes, budget)


def estimate_device_memory(shape: Shape, rows: Rows, base_known: bool) -> float:
    """Bytes at the peak on the device of an offloaded model; ``estimate_memory`` is what the host holds.

    They are all modules outside the blocks (also of the base model and of the surrogate), and the larger of a block
    with its gradients and the activations of ``recompute``, and of a block with the GPTQ of a layer.
    """
    block = 4.0 * shape.weights / shape.blocks
    largest_layer = max(out * width for out, width in shape.layers)
    training = 2 * block + _estimate_step_activations(shape, rows, recompute=True, budgets=OFFLOADED_BUDGETS)
    projection = block + 24.0 * largest_layer + 32.0 * max(shape.inputs) ** 2
    return 4.0 * shape.others * (3 if base_known else 1) + max(training, projection)


def estimate_traffic(shape: Shape, rows: Rows, recipe: Any) -> float:
    """Bytes moved between host and device for attribution and edit of an offloaded model.

    In a step the weights are moved twice for each of the parts, and their gradients once. A step has the short and the
    long rows of either set, or as many parts as keep its activations and logits within the budgets.
    """
    steps = recipe.steps + recipe.groups * count_sieve_steps(recipe.steps)
    part_tokens, _ = _part_tokens(shape, rows, recompute=True, budgets=OFFLOADED_BUDGETS)
    return 3.0 * max(STEP_PARTS, math.ceil(rows.step / part_tokens)) * steps * 4 * shape.weights


def estimate_operations(shape: Shape, rows: Rows, recipe: Any, base_known: bool) -> dict[str, float]:
    """Floating-point operations of each stage; a multiplication and an addition count as two.

    Those of the projection are in float64. The output embedding is multiplied at the tokens that count only.
    """
    body, head = 2.0 * shape.weights, 2.0 * shape.vocabulary * shape.hidden
    attention = 4.0 * rows.tokens * shape.hidden * shape.blocks
    forget_rows, retain_rows = rows.step_rows
    forward = (body + attention) * rows.step + head * (forget_rows * rows.answer + retain_rows * (rows.tokens - 1))
    # The gradient of the inputs costs as much as the forward pass, with twice its attention; so does that of all
    # weights, and that of the support its share of it.
    inputs = forward + attention * rows.step + (forward if recipe.recompute else 0.0)
    dense, sparse = body * rows.step, recipe.density * body * rows.step
    token_statistics = body + attention + 0.5 * shape.moment_bytes
    inverses = sum(5.0 / 3 * width**3 for _, width in shape.layers)
    columns = sum(float(out) * width**2 for out, width in shape.layers)
    token = body + attention
    metric_rows = 0 if shape.has_small_moments else min(rows.retain, METRIC_ROWS)
    predictions = rows.forget * rows.tokens * (1 + SWAPPED_NAMES) + NAME_TRIALS * rows.tokens
    swaps = predictions * token + rows.forget * rows.answer * (1 + SWAPPED_NAMES) * head
    return {
        "statistics": (rows.retain + metric_rows) * rows.tokens * token_statistics + 2 * columns,
        "projection (float64)": inverses + columns if recipe.projection != "rtn" else 0.0,
        "target": estimate_surrogate_operations(shape, rows, recipe.steps * rows.step * SURROGATE_BUDGET)
        + 2 * rows.forget * (rows.tokens * token + rows.answer * head)
        if base_known
        else swaps,
        "teacher": rows.retain * rows.tokens * (token + head),
        "attribution": recipe.groups * count_sieve_steps(recipe.steps) * (forward + inputs + dense / recipe.groups),
        "edit": recipe.steps * (forward + inputs + sparse),
    }


def estimate_surrogate_operations(shape: Shape, rows: Rows, tokens: float) -> float:
    """Operations of training the surrogate on ``tokens``: forward, the gradient of the inputs, and the adapter's own.

    The adapter is multiplied in the forward pass and twice in the backward pass.
    """
    head = 2.0 * shape.vocabulary * shape.hidden * rows.answer / rows.tokens
    attention = 4.0 * rows.tokens * shape.hidden * shape.blocks
    adapter = 2.0 * SURROGATE_RANK * sum(out + width for out, width in shape.layers)
    return tokens * (2 * (2.0 * shape.weights + head) + 3 * attention + 3 * adapter)


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
