"""Tokenizers whose tokens straddle the boundary between question and answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lm_ortho.data.rows import write_rows
from lm_ortho.harness.tokens import Tokens
from tests.support.harness import ROWS, TEXT, make_model, make_tokenizer, run


def train_straddling_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over text texts: "Answer: Ada" may be one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row.context + row.target for row in ROWS] * 4 + [TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>", model_max_length=96
    )


STRADDLING = train_straddling_tokenizer()


def straddles(context: str, continuation: str) -> bool:
    ids, context_ids = STRADDLING.encode(context + continuation), STRADDLING.encode(context)
    return ids[: len(context_ids)] != context_ids


def test_some_rows_have_a_straddling_token() -> None:
    assert any(straddles(row.context, row.target) for row in ROWS if row.context)


@pytest.mark.parametrize("tokenizer", [STRADDLING, make_tokenizer()], ids=["straddling", "aligned"])
def test_a_split_is_at_the_nearest_token_boundary(tokenizer: Any) -> None:
    tokens = Tokens(tokenizer, 96)
    for row in ROWS:
        if not row.context:
            continue
        context, answer = tokens.split_at_boundary(row.context, row.target)
        text = row.context + row.target
        assert context + answer == text
        assert answer.endswith(row.target)
        assert context == context.rstrip()
        ids, start = tokenizer.encode(text), tokenizer.encode(context)
        assert ids[: len(start)] == start
        assert tokens.count(context, answer) == len(ids) - len(start)
        # No boundary is nearer to the start of the answer.
        nearer = range(len(context) + 1, len(row.context) + 1)
        assert not any(not text[i - 1].isspace() and tokens.is_boundary(text, i) for i in nearer)


def test_an_aligned_boundary_is_unchanged() -> None:
    tokens = Tokens(make_tokenizer(), 96)
    for row in ROWS:
        if row.context:
            assert tokens.split_at_boundary(row.context, row.target) == (row.context, row.target)


def test_answers_are_scored_with_the_tokens_of_the_whole_text(tmp_path: Any) -> None:
    """forget_set against a direct computation over text documents."""
    model = make_model(len(STRADDLING)).float()
    rows = [row for row in ROWS if row.context]
    write_rows(tmp_path / "rows.jsonl", rows)
    lm = HFLM(pretrained=model, tokenizer=STRADDLING, device="cpu", batch_size=4)
    metadata = {"tokenizer": STRADDLING, "max_length": 96, "forget": str(tmp_path / "rows.jsonl")}
    result = run(lm, ["forget_set"], metadata, log_samples=True)
    tokens = Tokens(STRADDLING, 96)
    for row, sample in zip(rows, result["samples"]["forget_set"], strict=True):
        ids = STRADDLING.encode(row.context + row.target)
        start = len(STRADDLING.encode(tokens.split_at_boundary(row.context, row.target)[0]))
        ids, start = ([STRADDLING.bos_token_id, *ids], 1) if start == 0 else (ids, start)
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0, start - 1 : -1], -1)
        losses = -logp.gather(-1, torch.tensor(ids[start:])[:, None])
        assert sample["ppl"][0] == pytest.approx(float(losses.sum()), abs=1e-3)
        assert sample["ppl"][1] == len(losses)
