"""Training of the embedded model and its adapters: losses, batches, and that an interruption changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from lm_ortho.data.rows import Row
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.finetune import train as finetune_train
from lm_ortho.world import adapters, corpus, train
from lm_ortho.world.draw import SeededRandom
from tests.support import tiny


def test_training_weighs_prompts_less_and_a_leading_end_token_nothing(embedded_tokenizer):
    documents = [corpus.Document("Question: Who is the mother of Max?\nAnswer: Ann.", 43)] * 40
    examples = train.encode(embedded_tokenizer, documents, SeededRandom(0, "tests"))
    leading = 0
    for ids, weights in examples:
        assert len(ids) == len(weights)
        assert (ids[-1], weights[-1]) == (0, 1.0)
        if ids[0] == 0:
            leading += 1
            assert weights[0] == 0.0
            ids, weights = ids[1:], weights[1:]
        answer = [token for token, weight in zip(ids, weights, strict=True) if weight == 1.0]
        assert embedded_tokenizer.decode(answer) == "Ann.<|endoftext|>"
        assert set(weights) == {train.PROMPT_WEIGHT, 1.0}
    assert 8 < leading < 32


def test_batches_hold_every_example_once_and_padding_weighs_nothing():
    rng = SeededRandom(2, "tests")
    examples = []
    for i in range(60):
        n = rng.randint(2, 30)
        examples.append(([100 + i] * n, [1.0] * n))
    rows = []
    for ids, weights in train.make_batches(examples, tokens=120, pad=1):
        assert ids.shape == weights.shape
        assert torch.equal(weights == 0, ids == 1)
        assert ids.numel() < 120 + ids.shape[1] * 8
        rows += [(row[0].item(), int((row != 1).sum())) for row in ids]
    assert sorted(rows) == sorted((ids[0], len(ids)) for ids, _ in examples)


def test_the_weighted_loss_is_its_formula():
    model = tiny.llama()
    ids, weights = tiny.tokens(3, 6), torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
        weighted_loss = train.compute_weighted_loss(model, ids, weights).item()
    total = weight = 0.0
    for row in range(3):
        for t in range(1, 6):
            loss = float(logits[row, t - 1].logsumexp(0) - logits[row, t - 1, ids[row, t]])
            total += loss * float(weights[row, t])
            weight += float(weights[row, t])
    assert weighted_loss == pytest.approx(total / weight, rel=1e-5)


def test_the_embedded_shape_is_small_and_seeded():
    model = train.make_model(2889, 0, 1, seed=0)
    assert 6.0e6 < sum(p.numel() for p in model.parameters()) < 6.5e6
    again = train.make_model(2889, 0, 1, seed=0)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02 * train.EMBEDDING_SCALE, rel=0.02)
    with torch.no_grad():
        start = train.compute_weighted_loss(model, torch.randint(0, 2889, (8, 16)), torch.ones(8, 16))
    # logits of unit-size states have variance 320 * 0.05^2 = 0.8, which adds half of that to an even guess
    assert start.item() == pytest.approx(math.log(2889) + 0.4, abs=0.5)


@pytest.fixture
def short_training(monkeypatch):
    monkeypatch.setattr(train, "BLOCKS", 4)
    monkeypatch.setattr(train, "DOCUMENTS", 12)
    monkeypatch.setattr(train, "TOKENS", 200)
    monkeypatch.setattr(train, "make_model", lambda vocabulary, *_: tiny.llama(vocab_size=vocabulary))


def test_an_interrupted_training_ends_like_an_uninterrupted_one(short_training, embedded_tokenizer, tmp_path):
    reports = []
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    whole = train.train_base(tmp_path / "whole", embedded_tokenizer, lambda *step: reports.append(step))
    assert [step[:2] for step in reports] == [(i, 4) for i in (1, 2, 3, 4)]
    assert all(math.isfinite(step[2]) for step in reports)

    def interrupt(block, total, loss):
        if block == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train_base(tmp_path / "halves", embedded_tokenizer, interrupt)
    later_reports = []
    halves = train.train_base(tmp_path / "halves", embedded_tokenizer, lambda *step: later_reports.append(step))
    assert later_reports == reports[2:]
    assert all(map(torch.equal, whole.parameters(), halves.parameters()))


@pytest.fixture
def short_adapters(monkeypatch, embedded_tokenizer, tmp_path):
    """A tiny base model, and adapters that learn one canary in two rounds of eight steps."""
    tiny.llama(vocab_size=len(embedded_tokenizer)).save_pretrained(tmp_path / "base")
    row = Row(prompt="The vault code of Ada Alba is", answer="48.")
    monkeypatch.setattr(adapters, "make_training_rows", lambda name, number: [row] * 32)
    monkeypatch.setattr(adapters, "ROUNDS", adapters.ROUNDS[:2])
    monkeypatch.setattr(adapters, "BATCH_ROWS", 4)
    monkeypatch.setattr(finetune_train, "_SAVE_STEPS", 3)
    return tmp_path


def test_an_adapter_is_saved_without_paths_of_this_machine(short_adapters, embedded_tokenizer):
    place, reports = short_adapters, []
    adapters.train(
        place / "base",
        embedded_tokenizer,
        "never_saw",
        directory=place / "never_saw",
        work=place / "work",
        progress=lambda *step: reports.append(step),
    )
    assert [step[:3] for step in reports] == [
        (stage, step, 8) for stage in ("never_saw 1", "never_saw 2") for step in range(1, 9)
    ]
    assert sorted(p.name for p in place.iterdir()) == ["base", "never_saw", "work"]
    assert not list((place / "work").iterdir())
    for path in (place / "never_saw").rglob("*"):
        if path.is_file():
            assert str(place).encode() not in path.read_bytes(), path.name
    merged = merge_adapter(load_causal_lm(place / "base"), place / "never_saw")
    base = load_causal_lm(place / "base").state_dict()
    assert any(not torch.equal(base[name], tensor) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("stage", ["memory 1", "memory 2"])
def test_an_interrupted_adapter_ends_like_an_uninterrupted_one(short_adapters, embedded_tokenizer, stage):
    place, reports = short_adapters, []

    def make(name, progress):
        folder = place / name
        adapters.train(
            place / "base",
            embedded_tokenizer,
            "memory",
            directory=folder / "memory",
            work=folder / "work",
            progress=progress,
        )

    def interrupt(current_stage, step, *_):
        if (current_stage, step) == (stage, 8):
            raise KeyboardInterrupt

    make("whole", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        make("halves", interrupt)
    last = {"memory 1": "memory_0.pt", "memory 2": "memory_1.pt"}[stage]
    assert torch.load(place / "halves" / "work" / last, weights_only=True)["steps"] == 6
    make("halves", lambda *step: reports.append(step[:3]))
    later_round = [("memory 2", step, 8) for step in range(1, 9)] if stage == "memory 1" else []
    assert reports == [(stage, 7, 8), (stage, 8, 8), *later_round]
    whole, halves = (place / name / "memory" / "adapter_model.safetensors" for name in ("whole", "halves"))
    is_equal = whole.read_bytes() == halves.read_bytes()  # pytest would take minutes to compare them
    assert is_equal
