"""Logits at selected positions: the same numbers as all logits, from a smaller product."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_ortho.data.encoding import ANSWER, CONTEXT, Example, answer_loss
from lm_ortho.data.logits import compute_logits, selected_logits
from tests.support import tiny


def draw_mask(shape: torch.Size, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3


def count_head_rows(model: Any) -> list[int]:
    """The number of positions of every product with the output embedding, as they happen."""
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    return rows


def test_logits_at_a_mask_are_those_of_the_whole_product() -> None:
    model, ids = tiny.llama(), tiny.tokens(3, 12)
    rows = count_head_rows(model)
    mask = draw_mask(ids.shape, 0)
    whole = compute_logits(model, ids)
    outside = compute_logits(model, ids, mask)
    with selected_logits(model):
        inside = compute_logits(model, ids, mask)
        assert torch.equal(compute_logits(model, ids), whole)
    assert torch.equal(outside, whole[mask])
    torch.testing.assert_close(inside, whole[mask])
    assert rows == [36, 36, int(mask.sum()), 36]
    assert not model.lm_head._forward_pre_hooks


def test_threads_have_masks_of_their_own() -> None:
    model, ids = tiny.llama(), tiny.tokens(4, 16)
    whole = compute_logits(model, ids).detach()
    with selected_logits(model), ThreadPoolExecutor(4) as pool, torch.no_grad():
        masks = [draw_mask(ids.shape, seed) for seed in range(24)]
        results = list(pool.map(lambda mask: compute_logits(model, ids, mask), masks))
    for mask, logits in zip(masks, results, strict=True):
        torch.testing.assert_close(logits, whole[mask])


def test_a_failed_pass_leaves_no_mask_behind() -> None:
    model, ids = tiny.llama(), tiny.tokens(2, 8)
    with selected_logits(model):
        with pytest.raises(IndexError):
            compute_logits(model, ids + 10**9, draw_mask(ids.shape, 1))
        assert compute_logits(model, ids).shape == (2, 8, model.config.vocab_size)


def test_the_gradient_of_the_answer_loss_does_not_depend_on_the_selection() -> None:
    model = tiny.llama().double()
    examples = [
        Example(tuple(ids.tolist()), (CONTEXT,) * cut + (ANSWER,) * (9 - cut))
        for cut, ids in zip((2, 4, 5, 8), tiny.tokens(4, 9), strict=True)
    ]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = torch.autograd.grad(answer_loss(model, examples), weights)
    with selected_logits(model):
        selected = torch.autograd.grad(answer_loss(model, examples), weights)
    for one, other in zip(plain, selected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
