"""Target distributions for every predicted token of the forget set, padded to one block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lm_ortho.data.encoding import END, SECRET, Example, pad_batch
from lm_ortho.data.logits import compute_logits, selected_logits

FULL_VOCABULARY = 8192
"""Largest vocabulary whose distributions are stored in full; of larger ones the ``TOP_TOKENS`` likeliest tokens and
the total probability of all others are stored."""
TOP_TOKENS = 256
MEMORISED_MARGIN = 0.15
"""A token counts as memorised when the merged model gives it more than this much probability above the target."""
CHUNK_PROBABILITIES = 2**25
"""Largest number of probabilities of one chunk of rows, and of one batch of predictions: 128 MiB in float32."""
BATCH_TOKENS = 4096
"""Largest number of tokens of one batch of predictions, padding included."""
_COMPETITORS = 8
_MIN_MASS = 1e-30


@dataclass(frozen=True)
class Target:
    """The target distributions of the forget examples, each from its first predicted token on.

    Attributes:
        start: Index of the first predicted token, (examples,).
        probs: Target probabilities, (examples, tokens, vocabulary), or (examples, tokens, top tokens) where ``ids``
            is set.
        tokens: The true tokens, (examples, tokens).
        real: 1.0 for real tokens, 0.0 for padding, (examples, tokens).
        secret: Boolean mask of the secret tokens, (examples, tokens).
        label_logp: Target log-probability of the true token in nats, (examples, tokens).
        negative_entropy: Negative entropy of the target distribution in nats, (examples, tokens).
        ids: Of a large vocabulary the tokens that ``probs`` belongs to, the true one among them,
            (examples, tokens, top tokens); None where distributions are stored in full.
        remainder: Total probability of all tokens that are not in ``ids``, (examples, tokens), or None.
        vocabulary: Size of a large vocabulary.
    """

    start: Tensor
    probs: Tensor
    tokens: Tensor
    real: Tensor
    secret: Tensor
    label_logp: Tensor
    negative_entropy: Tensor
    ids: Tensor | None = None
    remainder: Tensor | None = None
    vocabulary: int = 0

    def distribution(self, example: int) -> Tensor:
        """Distributions (tokens, vocabulary) of one example; tokens not in ``ids`` share the remainder evenly."""
        if self.ids is None or self.remainder is None:
            return self.probs[example]
        ids = self.ids[example].long()
        share = self.remainder[example] / (self.vocabulary - ids.shape[-1])
        return share[:, None].repeat(1, self.vocabulary).scatter_(-1, ids, self.probs[example])

    def kl(self, rows: Tensor, width: int, logp: Tensor) -> Tensor:
        """KL(target || model) in nats, (rows, width); ``logp`` (rows, width, vocabulary) is that of the model."""
        probs = self.probs[rows, :width].to(logp.device)
        negative_entropy = self.negative_entropy[rows, :width].to(logp.device)
        if self.ids is None or self.remainder is None:
            return negative_entropy - (probs * logp).sum(-1)
        top_logp = logp.gather(-1, self.ids[rows, :width].to(logp.device).long())
        remainder = self.remainder[rows, :width].to(logp.device)
        return negative_entropy - (probs * top_logp).sum(-1) - remainder * log_remaining_mass(top_logp)

    def secret_loss(self) -> list[Tensor]:
        """The loss of the target itself in nats on each example's secret tokens."""
        return [-logp[mask] for logp, mask in zip(self.label_logp, self.secret, strict=True)]


def stack(examples: Sequence[Example], probs: Iterable[Tensor]) -> Target:
    """A ``Target`` from one (predicted tokens, vocabulary) tensor per example.

    Each tensor is reduced to what is stored before the next one is requested, so an iterator over those of a large
    vocabulary need not hold them all.
    """
    iterator = iter(probs)
    first = next(iterator)
    width = max(len(example.ids) - example.start for example in examples)
    n, vocabulary = len(examples), first.shape[1]
    in_full = vocabulary <= FULL_VOCABULARY
    depth = vocabulary if in_full else TOP_TOKENS
    # 1. Allocate the padded block.
    block = torch.zeros(n, width, depth)
    ids = torch.zeros(n, width, 0 if in_full else depth, dtype=torch.int32)
    label, remainder = torch.zeros(n, width), torch.zeros(n, width)
    tokens = torch.zeros(n, width, dtype=torch.long)
    real, secret = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.bool)
    # 2. Fill in each example, of a large vocabulary only the likeliest tokens and the remaining mass.
    for i, (example, p) in enumerate(zip(examples, chain([first], iterator), strict=True)):
        k = p.shape[0]
        tokens[i, :k] = torch.tensor(example.ids[example.start :])
        label[i, :k] = p.gather(-1, tokens[i, :k, None])[:, 0]
        if in_full:
            block[i, :k] = p
        else:
            ids[i, :k], block[i, :k] = select_top_tokens(p, depth, tokens[i, :k])
            remainder[i, :k] = (1.0 - block[i, :k].sum(-1)).clamp_min(0.0)
        real[i, :k] = 1.0
        secret[i, :k] = torch.tensor([role == SECRET for role in example.roles[example.start :]])
    # 3. Without marked secrets, all of the answer but the end token counts as secret.
    if not secret.any():
        for i, example in enumerate(examples):
            roles = example.roles[example.start :]
            secret[i, : len(roles)] = torch.tensor([role != END for role in roles])
    # 4. Compute the entropy term of KL(target || model), which does not depend on the model.
    negative_entropy = (block * block.clamp_min(1e-9).log()).sum(-1)
    if not in_full:
        negative_entropy += remainder * remainder.clamp_min(1e-9).log()
    return Target(
        start=torch.tensor([e.start for e in examples]),
        probs=block,
        tokens=tokens,
        real=real,
        secret=secret,
        label_logp=label.clamp_min(1e-9).log(),
        negative_entropy=negative_entropy,
        ids=None if in_full else ids,
        remainder=None if in_full else remainder,
        vocabulary=0 if in_full else vocabulary,
    )


def select_top_tokens(probs: Tensor, count: int, always: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids (..., count) int32 of the largest entries of ``probs`` (..., vocabulary), and their values.

    The token ``always`` (...) is included in any case; if need be it replaces the least likely one.
    """
    ids = probs.topk(count, -1).indices
    if always is not None:
        missing = ~(ids == always[..., None]).any(-1)
        ids[..., -1] = torch.where(missing, always, ids[..., -1])
    return ids.to(torch.int32), probs.gather(-1, ids)


def log_remaining_mass(logp: Tensor) -> Tensor:
    """Log of the probability that the tokens of the last dimension leave to all others, clamped at log 1e-6."""
    return (1.0 - logp.exp().sum(-1)).clamp_min(1e-6).log()


def split_into_chunks(examples: Sequence[Example], vocabulary: int) -> Iterator[range]:
    """Yields the indices of all examples in order, in chunks of neighbours.

    The distributions of the predicted tokens of a chunk are at most ``CHUNK_PROBABILITIES`` numbers, or those of one
    example.
    """
    begin, size = 0, 0
    for i, example in enumerate(examples):
        probabilities = (len(example.ids) - example.start) * vocabulary
        if i > begin and size + probabilities > CHUNK_PROBABILITIES:
            yield range(begin, i)
            begin, size = i, 0
        size += probabilities
    if begin < len(examples):
        yield range(begin, len(examples))


def vocabulary_size(model: torch.nn.Module) -> int:
    """Number of tokens of the vocabulary, by the configuration of the model."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def predict_distributions(model: torch.nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """The model's own distributions, (predicted tokens, vocabulary) float32 per example, on the CPU.

    They are all held at the same time: ``split_into_chunks`` bounds them.
    """
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    positions = [range(example.start, len(example.ids)) for example in examples]
    for i, probs in predict_tokens(model, examples, positions):
        result[i] = probs.clone()
    return result


@torch.no_grad()
def predict_tokens(
    model: torch.nn.Module, examples: Sequence[Example], positions: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Tensor]]:
    """Yields the index of an example and the distributions of the tokens at its ``positions``, in any order.

    ``positions`` are ascending, from 1 on; examples without any are left out. Distributions are (positions,
    vocabulary) float32 on the CPU, a view of those of a batch: what is stored for long has to be copied.
    """
    device = next(model.parameters()).device
    for batch in _batch_positions(examples, positions, vocabulary_size(model)):
        # 1. Mark the position before each token, where the model predicts it.
        ids, _ = pad_batch([examples[i] for i in batch], device)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, i in enumerate(batch):
            mask[row, torch.tensor(positions[i]) - 1] = True
        # 2. Compute the logits at these positions only.
        with selected_logits(model):
            probs = compute_logits(model, ids, mask).softmax(-1).cpu()
        yield from zip(batch, probs.split([len(positions[i]) for i in batch]), strict=True)


def _batch_positions(
    examples: Sequence[Example], positions: Sequence[Sequence[int]], vocabulary: int
) -> list[list[int]]:
    """The indices of all examples with positions, in batches of similar length; a batch may be a single example.

    A batch has at most ``BATCH_TOKENS`` tokens with its padding, and ``CHUNK_PROBABILITIES`` probabilities.
    """
    batches, probabilities = list[list[int]](), 0
    for i in sorted(filter(lambda i: len(positions[i]), range(len(examples))), key=lambda i: len(examples[i].ids)):
        size = len(positions[i]) * vocabulary
        is_full = not batches or (len(batches[-1]) + 1) * len(examples[i].ids) > BATCH_TOKENS
        if is_full or probabilities + size > CHUNK_PROBABILITIES:
            batches.append([])
            probabilities = 0
        batches[-1].append(i)
        probabilities += size
    return batches


def hold_down(probs: Tensor, tokens: Tensor, is_memorised: Tensor) -> Tensor:
    """``probs`` with the true token of memorised positions lowered to the mean of the 8 largest other probabilities.

    ``probs`` (tokens, vocabulary), ``tokens`` and the boolean mask ``is_memorised`` (tokens,). Never raises a
    probability before renormalising; other positions stay as they are.
    """
    at = torch.arange(len(tokens))
    new_probs = probs.clone()
    new_probs[at, tokens] = 0.0
    cap = new_probs.topk(min(_COMPETITORS, probs.shape[1] - 1), -1).values.mean(-1)
    new_probs[at, tokens] = torch.minimum(probs[at, tokens], cap)
    mass = new_probs.sum(-1, keepdim=True)  # (nearly) zero when the model gives the true token all of it
    new_probs = torch.where(mass > _MIN_MASS, new_probs / mass.clamp_min(_MIN_MASS), 1 / probs.shape[1])
    return torch.where(is_memorised[:, None], new_probs, probs)
