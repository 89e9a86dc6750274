"""Compares a merged model with its adapter: the same logits, and how much of the change rounding to BF16 leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example, max_row_tokens
from lm_ortho.data.logits import compute_logits
from lm_ortho.errors import UserError

MERGE_TOLERANCE = 0.01
"""Largest difference between merged and un-merged logits, as a share of the adapter's effect on them (both norms)."""
ROUNDING_TOLERANCE = 1e-4
"""The same as a share of the logits: float32 sums in another order differ by up to 1e-5, in a deep model."""
_PROBE_ROWS, _PROBE_TOKENS = 4, 16


@dataclass
class WeightChange:
    """What a merge changed: weights in all, those that differ after rounding to BF16, and the size of the change.

    ``norm`` is the sum of squares of the change before rounding, ``surviving`` its scalar product with the change that
    is left after rounding.
    """

    weights: int = 0
    changed: int = 0
    norm: float = 0.0
    surviving: float = 0.0

    @property
    def surviving_share(self) -> float:
        """Share of the change that rounding to BF16 leaves: the rounded change, projected on the exact one."""
        return self.surviving / self.norm if self.norm else 0.0

    def __add__(self, other: WeightChange) -> WeightChange:
        return WeightChange(
            self.weights + other.weights,
            self.changed + other.changed,
            self.norm + other.norm,
            surviving=self.surviving + other.surviving,
        )

    def add(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Adds the change of some parameters, by name; those of another shape count as changed in full."""
        for name, new in after.items():
            old = before.get(name)
            if old is None or old.shape != new.shape:
                self.changed += new.numel()
                continue
            old = old.to(new.dtype)
            if torch.equal(old, new):
                continue
            rounded = new.bfloat16().to(new.dtype)
            exact, left = new - old, rounded - old
            self.changed += int((rounded != old).sum())
            self.norm += float(exact.square().sum(dtype=torch.float64))
            self.surviving += float((exact * left).sum(dtype=torch.float64))


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module with two or more dimensions, by name, without gradients."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.dim() > 1}


def draw_probe_ids(model: nn.Module, trained_tokens: Iterable[int] = ()) -> Tensor:
    """Token ids (4, 16) int64 to compare logits on: ``trained_tokens`` first, then random ones from a fixed seed.

    Without the special tokens of the config, for some of which a model expects an image.
    """
    config: Any = model.config
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    special = {
        value
        for name, value in config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    usual = torch.tensor([i for i in range(rows) if i not in special] or [0])
    width = min(_PROBE_TOKENS, max_row_tokens(model))
    draws = torch.randint(len(usual), (_PROBE_ROWS * width,), generator=torch.Generator().manual_seed(0))
    ids = usual[draws]
    trained = torch.tensor([i for i in trained_tokens if i < rows][: len(ids) // 2], dtype=torch.int64)
    ids[: len(trained)] = trained
    return ids.view(_PROBE_ROWS, width)


def first_ids(examples: Sequence[Example]) -> Tensor:
    """The first tokens (up to 4 rows, up to 32 tokens) int64 of the first examples, padded on the right with 0."""
    rows = [example.ids[: 2 * _PROBE_TOKENS] for example in examples[:_PROBE_ROWS]]
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


@torch.no_grad()
def probe(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits (rows, tokens, vocabulary) of the probe, float32 on the CPU."""
    return compute_logits(model, ids.to(next(model.parameters()).device)).cpu()


def check_logits(plain: Tensor, live: Tensor, merged: Tensor, *, source: str, kind: str) -> None:
    """Raises ``UserError`` unless the ``merged`` model computes what the adapter computed ``live``.

    Args:
        plain: logits of the model without the adapter.
        live: logits of the model with the adapter, not merged.
        merged: logits of the merged model before its weights are rounded.
        source: begins the message.
        kind: the PEFT type.
    """
    difference, effect = _distance(merged, live), _distance(live, plain)
    if not difference <= MERGE_TOLERANCE * effect + ROUNDING_TOLERANCE * float(live[live.isfinite()].norm()):
        size = f"{difference / effect:.2g} times" if effect else "more than"
        raise UserError(
            f"{source}: peft merges this {kind} adapter wrongly: the merged model differs from the model with its "
            f"adapter by {size} the effect of the adapter; merge it in another way and give the result as pretrained="
        )


def _distance(a: Tensor, b: Tensor) -> float:
    """Euclidean distance; equal infinities, as some models have for padding tokens, count as no difference."""
    return float((a - b).where(a != b, 0.0).norm())


@dataclass(frozen=True)
class LogitChange:
    """Mean and maximum of the absolute change of logits by a merge, and the error of rounding as a share of it."""

    mean: float
    largest: float
    rounding_error: float

    @classmethod
    def measure(cls, plain: Tensor, live: Tensor, rounded: Tensor) -> LogitChange:
        """From the logits (rows, tokens, vocabulary) without the adapter, with it, and of the rounded merged model."""
        change = (rounded - plain).where(rounded != plain, 0.0).abs()
        effect = _distance(live, plain)
        error = _distance(rounded, live) / effect if effect else 0.0
        return cls(float(change.mean()), float(change.max()), error)
