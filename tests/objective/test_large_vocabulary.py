"""Distributions of which only the likeliest tokens are kept, against those kept whole."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.config import make_recipe
from lm_ortho.data.encoding import CONTEXT, SECRET, Example, batch_by_length, encode, max_batch_tokens
from lm_ortho.objective import GENTLE, check_target
from lm_ortho.objective.distribution import likeliest, log_of_others, stack
from lm_ortho.objective.loss import forget_loss
from lm_ortho.objective.teacher import Teacher
from lm_ortho.pipeline.decomposition import decompose

distribution = importlib.import_module("lm_ortho.objective.distribution")
teacher_module = importlib.import_module("lm_ortho.objective.teacher")
VOCABULARY = 24


def keep(monkeypatch, kept):
    """Keeps this many tokens of every vocabulary."""
    for module in (distribution, teacher_module):
        monkeypatch.setattr(module, "WHOLE", 0)
        monkeypatch.setattr(module, "KEPT", kept)


def examples_and_probs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for given_tokens, answer in ((3, 4), (1, 1), (5, 2)):
        ids = tuple(torch.randint(0, VOCABULARY, (given_tokens + answer,), generator=generator).tolist())
        examples.append(Example(ids, (CONTEXT,) * given_tokens + (SECRET,) * answer))
    return examples, [
        (torch.randn(len(e.ids) - e.start, VOCABULARY, generator=generator) * 2).softmax(-1) for e in examples
    ]


@given(st.integers(0, 99), st.integers(1, VOCABULARY - 1))
@settings(max_examples=40)
def test_the_likeliest_hold_the_true_token(seed, kept):
    _, probs = examples_and_probs(seed)
    always = torch.arange(len(probs[0])) % VOCABULARY
    ids, values = likeliest(probs[0], kept, always)
    assert (ids == always[:, None]).any(-1).all()
    assert torch.equal(values, probs[0].gather(-1, ids.long()))
    assert all(len(set(row.tolist())) == kept for row in ids)
    plain, largest = likeliest(probs[0], kept)
    assert torch.equal(largest, probs[0].sort(-1, descending=True).values[:, :kept])
    torch.testing.assert_close(log_of_others(largest.log()).exp(), (1 - largest.sum(-1)).clamp_min(1e-6))
    assert plain.dtype == torch.int32


@given(st.integers(0, 99), st.integers(2, VOCABULARY - 1))
@settings(max_examples=40)
def test_what_is_put_together_hides_only_differences_inside_it(seed, kept):
    """A divergence between coarser distributions is never larger, and the same where only one token is left out."""
    examples, probs = examples_and_probs(seed)
    logits = torch.randn(len(examples), 7, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    whole = stack(examples, probs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep(monkeypatch, kept)
        part = stack(examples, probs)
    assert part.probs.shape[-1] == kept
    assert torch.equal(part.label_logp, whole.label_logp)
    rows, width = torch.arange(len(examples)), whole.real.shape[1]
    logp = logits[:, :width].log_softmax(-1)
    exact, coarse = (target.kl(rows, width, logp)[whole.real > 0] for target in (whole, part))
    assert (coarse <= exact + 1e-4).all()
    assert (coarse >= -1e-4).all()
    if kept == VOCABULARY - 1:
        torch.testing.assert_close(coarse, exact, rtol=1e-3, atol=1e-4)
        losses = [forget_loss(target, range(len(examples)), logits, GENTLE) for target in (whole, part)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_one_example_whole_again(monkeypatch):
    examples, probs = examples_and_probs()
    keep(monkeypatch, 6)
    target = stack(examples, probs)
    again = target.of(0)[: len(probs[0])]
    torch.testing.assert_close(again.sum(-1), torch.ones(len(again)))
    ids = target.ids[0, : len(again)].long()
    torch.testing.assert_close(again.gather(-1, ids), probs[0].gather(-1, ids))
    assert check_target(target, examples).secret_ppl == pytest.approx(
        check_target(stack(examples, probs), examples).secret_ppl
    )


def test_the_teacher_of_a_large_vocabulary(memorised, monkeypatch):
    _, retain = memorised.examples()
    other = copy.deepcopy(memorised.merged)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    whole = Teacher(memorised.merged, retain)
    rows = [2, 0, 5]
    logp = {}
    for name, model in (("same", memorised.merged), ("other", other)):
        with torch.no_grad():
            said = [model(input_ids=torch.tensor([retain[i].ids])).logits[0, :-1].log_softmax(-1) for i in rows]
        logp[name] = torch.cat(said)
    exact = whole.kl(rows, logp["other"])
    for kept in (8, 64):
        keep(monkeypatch, kept)
        part = Teacher(memorised.merged, retain)
        coarse = part.kl(rows, logp["other"])
        assert (coarse <= exact + 2e-3).all()
        assert part.kl(rows, logp["same"]).abs().max() < 2e-3
    assert float(coarse.sum()) > 0.8 * float(exact.sum())


def test_a_decomposition_with_few_tokens_kept(memorised, monkeypatch):
    keep(monkeypatch, 64)
    made = decompose(
        copy.deepcopy(memorised.merged), memorised.tokenizer, memorised.forget, memorised.retain,
        make_recipe(steps=20, density=0.05),
    )  # fmt: skip
    assert made.report["steps_moved"] > 0
    assert made.report["target"]["secret_ppl"] > 2


def test_batches_hold_no_more_tokens_than_fit(memorised):
    examples = encode(memorised.tokenizer, memorised.forget + memorised.retain)
    for most in (20, 100, 10**6):
        batches = batch_by_length(examples, rows=4, tokens=most)
        assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
        for batch in batches:
            width = max(len(examples[i].ids) for i in batch)
            assert len(batch) == 1 or len(batch) * width <= most
            assert len(batch) <= 4
    assert max_batch_tokens(memorised.merged) == 2**28 // memorised.merged.config.vocab_size
