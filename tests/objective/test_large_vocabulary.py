"""Distributions of which only the likeliest tokens are stored, against those stored in full."""

from __future__ import annotations

import copy
import gc
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.config import make_recipe
from lm_ortho.data import Row
from lm_ortho.data.encoding import CONTEXT, SECRET, Example, batch_by_length, encode, max_batch_tokens
from lm_ortho.objective import GENTLE, check_target, distribution
from lm_ortho.objective import teacher as teacher_module
from lm_ortho.objective.distribution import log_remaining_mass, select_top_tokens, stack
from lm_ortho.objective.loss import forget_loss, mask_answer_positions
from lm_ortho.objective.swap import swap_target
from lm_ortho.objective.teacher import Teacher
from lm_ortho.pipeline.decomposition import decompose

VOCABULARY = 24


def store_top_tokens(monkeypatch, count):
    """Stores this many tokens of every vocabulary."""
    for module in (distribution, teacher_module):
        monkeypatch.setattr(module, "FULL_VOCABULARY", 0)
        monkeypatch.setattr(module, "TOP_TOKENS", count)


def draw_examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for context, answer in ((3, 4), (1, 1), (5, 2)):
        ids = tuple(torch.randint(0, VOCABULARY, (context + answer,), generator=generator).tolist())
        examples.append(Example(ids, (CONTEXT,) * context + (SECRET,) * answer))
    return examples, [
        (torch.randn(len(e.ids) - e.start, VOCABULARY, generator=generator) * 2).softmax(-1) for e in examples
    ]


@given(st.integers(0, 99), st.integers(1, VOCABULARY - 1))
@settings(max_examples=40)
def test_the_top_tokens_include_the_true_one(seed, count):
    _, probs = draw_examples(seed)
    always = torch.arange(len(probs[0])) % VOCABULARY
    ids, values = select_top_tokens(probs[0], count, always)
    assert (ids == always[:, None]).any(-1).all()
    assert torch.equal(values, probs[0].gather(-1, ids.long()))
    assert all(len(set(row.tolist())) == count for row in ids)
    plain, largest = select_top_tokens(probs[0], count)
    assert torch.equal(largest, probs[0].sort(-1, descending=True).values[:, :count])
    torch.testing.assert_close(log_remaining_mass(largest.log()).exp(), (1 - largest.sum(-1)).clamp_min(1e-6))
    assert plain.dtype == torch.int32


@given(st.integers(0, 99), st.integers(2, VOCABULARY - 1))
@settings(max_examples=40)
def test_the_kl_over_top_tokens_ignores_only_differences_among_the_others(seed, count):
    """A divergence between coarser distributions is never larger, and the same where only one token is not stored."""
    examples, probs = draw_examples(seed)
    logits = torch.randn(len(examples), 7, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
    full = stack(examples, probs)
    with pytest.MonkeyPatch.context() as monkeypatch:
        store_top_tokens(monkeypatch, count)
        top = stack(examples, probs)
    assert top.probs.shape[-1] == count
    assert torch.equal(top.label_logp, full.label_logp)
    rows, width = torch.arange(len(examples)), full.real.shape[1]
    logp = logits[:, :width].log_softmax(-1)
    exact, coarse = (target.kl(rows, width, logp)[full.real > 0] for target in (full, top))
    assert (coarse <= exact + 1e-4).all()
    assert (coarse >= -1e-4).all()
    if count == VOCABULARY - 1:
        torch.testing.assert_close(coarse, exact, rtol=1e-3, atol=1e-4)
        predicting = logits[:, : max(len(e.ids) for e in examples)][mask_answer_positions(examples)]
        losses = [forget_loss(target, range(len(examples)), predicting, GENTLE) for target in (full, top)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_the_distribution_of_one_example_is_restored(monkeypatch):
    examples, probs = draw_examples()
    store_top_tokens(monkeypatch, 6)
    target = stack(examples, probs)
    distributions = target.distribution(0)[: len(probs[0])]
    torch.testing.assert_close(distributions.sum(-1), torch.ones(len(distributions)))
    ids = target.ids[0, : len(distributions)].long()
    torch.testing.assert_close(distributions.gather(-1, ids), probs[0].gather(-1, ids))
    assert check_target(target, examples).secret_ppl == pytest.approx(
        check_target(stack(examples, probs), examples).secret_ppl
    )


def test_the_teacher_of_a_large_vocabulary(memorised_models, monkeypatch):
    _, retain = memorised_models.examples()
    other = copy.deepcopy(memorised_models.merged)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    full = Teacher(memorised_models.merged, retain)
    rows = [2, 0, 5]
    logp = {}
    for name, model in (("same", memorised_models.merged), ("other", other)):
        with torch.no_grad():
            row_logp = [model(input_ids=torch.tensor([retain[i].ids])).logits[0, :-1].log_softmax(-1) for i in rows]
        logp[name] = torch.cat(row_logp)

    def compute_kl(teacher, values):
        return teacher.kl_terms(rows, values.device)(slice(0, len(values)), values)[0]

    exact = compute_kl(full, logp["other"])
    for count in (8, 64):
        store_top_tokens(monkeypatch, count)
        top = Teacher(memorised_models.merged, retain)
        coarse = compute_kl(top, logp["other"])
        assert (coarse <= exact + 2e-3).all()
        assert compute_kl(top, logp["same"]).abs().max() < 2e-3
    assert float(coarse.sum()) > 0.8 * float(exact.sum())


def test_a_decomposition_with_few_stored_tokens(memorised_models, monkeypatch):
    store_top_tokens(monkeypatch, 64)
    model, recipe = copy.deepcopy(memorised_models.merged), make_recipe(steps=20, density=0.05)
    decomposition = decompose(
        model, memorised_models.tokenizer, memorised_models.forget, memorised_models.retain, recipe
    )
    assert decomposition.report["steps_moved"] > 0
    assert decomposition.report["target"]["secret_ppl"] > 2


def test_batches_hold_no_more_tokens_than_fit(memorised_models):
    examples = encode(memorised_models.tokenizer, memorised_models.forget + memorised_models.retain)
    for max_tokens in (20, 100, 10**6):
        batches = batch_by_length(examples, rows=4, tokens=max_tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
        for batch in batches:
            width = max(len(examples[i].ids) for i in batch)
            assert len(batch) == 1 or len(batch) * width <= max_tokens
            assert len(batch) <= 4
    assert max_batch_tokens(memorised_models.merged) == 2**28 // memorised_models.merged.config.vocab_size


def count_live_probabilities(vocabulary):
    """Number of elements of all tensors that end in the vocabulary, without parameters; views count once."""
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.dim() == 2 and t.shape[1] == vocabulary]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in tensors}.values())


@pytest.mark.parametrize("of_subjects", [True, False], ids=["swap", "resample"])
def test_few_distributions_exist_at_a_time_and_the_target_is_the_same(memorised_models, monkeypatch, of_subjects):
    model, tokenizer = memorised_models.merged, memorised_models.tokenizer
    vocabulary = model.config.vocab_size
    rows = memorised_models.forget[:6]
    if not of_subjects:
        rows = [Row(text=f"{row.context}{row.target}") for row in rows]
    examples = encode(tokenizer, rows)

    def make_target():
        live = []
        distributions = swap_target(model, tokenizer, rows, examples, seed=3, subjects=4)
        watched = (live.append(count_live_probabilities(vocabulary)) or probs for probs in distributions)
        return stack(examples, watched), max(live) - before

    store_top_tokens(monkeypatch, 16)
    gc.collect()
    before = count_live_probabilities(vocabulary)
    whole, most = make_target()
    longest = max(len(example.ids) - example.start for example in examples)
    budget = (longest + 2) * vocabulary
    assert most > 6 * budget
    monkeypatch.setattr(distribution, "CHUNK_PROBABILITIES", budget)
    gc.collect()
    chunked, most = make_target()
    assert most <= 6 * budget
    torch.testing.assert_close(chunked.probs, whole.probs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(chunked.label_logp, whole.label_logp, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_chunks_are_all_examples_in_order_and_within_the_budget(lengths, budget):
    examples = [Example((0,) * (n + 1), (CONTEXT,) + (SECRET,) * n) for n in lengths]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(distribution, "CHUNK_PROBABILITIES", 3 * budget)
        chunks = list(distribution.split_into_chunks(examples, vocabulary=3))
    assert [i for chunk in chunks for i in chunk] == list(range(len(examples)))
    assert all(len(chunk) == 1 or sum(lengths[i] for i in chunk) <= budget for chunk in chunks)
    for chunk, after in pairwise(chunks):
        assert sum(lengths[i] for i in chunk) + lengths[after.start] > budget  # no chunk is smaller than it need be


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_predictions_at_some_tokens_are_those_of_the_whole_row(memorised_models, monkeypatch, budget):
    model, vocabulary = memorised_models.merged, memorised_models.merged.config.vocab_size
    examples = encode(memorised_models.tokenizer, memorised_models.forget)
    monkeypatch.setattr(distribution, "CHUNK_PROBABILITIES", budget * vocabulary)
    positions = [list(range(1 + i % 3, len(example.ids), 1 + i % 4)) for i, example in enumerate(examples)]
    positions[2] = []
    computed = []
    head = model.get_output_embeddings().register_forward_hook(
        lambda *call: computed.append(call[2].shape[:-1].numel())
    )
    result = {i: probs.clone() for i, probs in distribution.predict_tokens(model, examples, positions)}
    head.remove()
    assert result.keys() == set(range(len(examples))) - {2}
    assert sum(computed) == sum(len(tokens) for tokens in positions)
    assert max(computed) <= max(budget, *(len(tokens) for tokens in positions))
    for i, probs in result.items():
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([examples[i].ids])).logits[0].softmax(-1)
        torch.testing.assert_close(probs, expected[torch.tensor(positions[i]) - 1], rtol=1e-4, atol=1e-6)
