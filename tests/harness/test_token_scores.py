"""Scores per token and gradient norms, against direct computations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from lm_ortho import layer
from lm_ortho.errors import UserError
from lm_ortho.harness.token_scores import GRADIENT_NORM, TOKEN_SCORES, score_tokens
from tests.support.harness import ROWS, make_model, make_tokenizer, random_streams

PAIRS = [(row.context, row.target) for row in ROWS if row.context] + [("", ROWS[4].text)]


def make_lm(model: Any, bos: bool = False, **options: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=make_tokenizer(bos), device="cpu", **options)


def send_requests(lm: Any, kind: str, pairs: list[tuple[str, str]]) -> list[Any]:
    requests = [
        Instance(request_type=kind, doc={}, arguments=pair, idx=number, metadata=("task", number, 1))
        for number, pair in enumerate(pairs)
    ]
    return list(getattr(lm, kind)(requests))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(len(make_tokenizer())).float()


@pytest.mark.parametrize("bos", [False, True])
def test_the_scores_add_up_to_the_log_likelihood(model: Any, bos: bool) -> None:
    lm = make_lm(model, bos)
    for (total, greedy), scores in zip(
        send_requests(lm, "loglikelihood", PAIRS), send_requests(lm, TOKEN_SCORES, PAIRS), strict=True
    ):
        assert sum(scores.logp) == pytest.approx(total, abs=1e-4)
        assert all(scores.greedy) is greedy
        assert len(set(map(len, scores))) == 1


@pytest.mark.parametrize("rows", [1, 4, "auto"])
def test_the_batch_size_does_not_matter(model: Any, rows: Any) -> None:
    single = send_requests(make_lm(model, batch_size=1), TOKEN_SCORES, PAIRS)
    batched = send_requests(make_lm(model, batch_size=rows), TOKEN_SCORES, PAIRS)
    for one, other in zip(single, batched, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-4)
        assert one.mean == pytest.approx(other.mean, abs=1e-4)
        assert one.deviation == pytest.approx(other.deviation, abs=1e-4)


def test_no_batch_has_more_rows_than_the_model_allows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, batch_sizes = make_lm(model), list[int]()
    original = lm._model_call
    monkeypatch.setattr(lm, "_model_call", lambda inputs: batch_sizes.append(len(inputs)) or original(inputs))
    lm.most_rows = 2
    send_requests(lm, TOKEN_SCORES, PAIRS)
    assert max(batch_sizes) == 2


def test_mean_and_deviation_match_the_distribution_of_the_model() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    logits[1, 4] = float("-inf")  # a masked token does not contribute
    scores = score_tokens(logits, torch.tensor([0, 5, 10]))
    share = torch.softmax(logits.double(), -1)
    logs = torch.where(share > 0, share.log(), 0)
    mean = (share * logs).sum(-1)
    assert scores.mean == pytest.approx(mean.tolist(), abs=1e-5)
    assert scores.deviation == pytest.approx((share * logs**2).sum(-1).sub(mean**2).sqrt().tolist(), abs=1e-5)


def direct_norm(model: torch.nn.Module, ids: torch.Tensor, count: int) -> float:
    """Returns the mean norm of the gradients that autograd computes for the weights of linear layers."""
    model = copy.deepcopy(model)
    logits = model(ids[None, :-1]).logits[0, -count:]
    torch.nn.functional.cross_entropy(logits, ids[-count:]).backward()
    norms = [float(m.weight.grad.norm()) for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    return sum(norms) / len(norms)


def gpt2(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=96, initializer_range=0.3)
    config.tie_word_embeddings = False
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("build", [make_model, gpt2])
def test_the_gradient_norm_equals_that_of_autograd(build: Any) -> None:
    model = build(len(make_tokenizer())).float()
    if build is make_model:  # a tied head shares its gradient with the embedding
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    lm = make_lm(model)
    (norm,) = send_requests(lm, GRADIENT_NORM, PAIRS[:1])
    context, answer = lm._encode_pair(*PAIRS[0])
    expected = direct_norm(model, torch.tensor(context + answer), len(answer))
    assert norm == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_norm_of_two_streams_equals_that_of_the_dense_model() -> None:
    model = make_model(len(make_tokenizer())).float()
    streams = random_streams(model)
    dense = copy.deepcopy(model)
    for name, layer_streams in streams.items():
        dense.get_submodule(name).weight.data = layer_streams.to_dense(1.0)
    layer.patch(model, streams)
    layer.set_alpha(model, 1.0)
    pairs = PAIRS[:3]
    expected = send_requests(make_lm(dense), GRADIENT_NORM, pairs)
    assert send_requests(make_lm(model), GRADIENT_NORM, pairs) == pytest.approx(expected, rel=1e-4)


def test_an_answer_longer_than_the_context_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="max_length=96: an answer of"):
        send_requests(make_lm(model), TOKEN_SCORES, [("Who?", " word" * 300)])


class SumsOnly(LM):
    """A model behind a network service, for example."""

    def loglikelihood(self, requests: Any) -> Any:
        return [(-1.0, False) for _ in requests]

    loglikelihood_rolling = generate_until = loglikelihood


def test_a_model_without_a_forward_pass_returns_none() -> None:
    for kind in (TOKEN_SCORES, GRADIENT_NORM):
        assert send_requests(SumsOnly(), kind, PAIRS[:2]) == [None, None]
