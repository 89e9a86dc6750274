"""Tokenizers whose tokens reach across the border between question and answer."""

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


def crossing_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over whole texts: "Answer: Ada" may be one token."""
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


CROSSING = crossing_tokenizer()


def crosses(context: str, continuation: str) -> bool:
    whole, start = CROSSING.encode(context + continuation), CROSSING.encode(context)
    return whole[: len(start)] != start


def test_some_rows_really_cross() -> None:
    assert any(crosses(row.context, row.target) for row in ROWS if row.context)


@pytest.mark.parametrize("tokenizer", [CROSSING, make_tokenizer()], ids=["crossing", "ending"])
def test_a_cut_lies_between_tokens_and_takes_no_more_than_it_must(tokenizer: Any) -> None:
    tokens = Tokens(tokenizer, 96)
    for row in ROWS:
        if not row.context:
            continue
        context, answer = tokens.cut(row.context, row.target)
        whole = row.context + row.target
        assert context + answer == whole
        assert answer.endswith(row.target)
        assert context == context.rstrip()
        ids, start = tokenizer.encode(whole), tokenizer.encode(context)
        assert ids[: len(start)] == start
        assert tokens.count(context, answer) == len(ids) - len(start)
        # No border lies nearer to where the answer starts.
        nearer = range(len(context) + 1, len(row.context) + 1)
        assert not any(not whole[i - 1].isspace() and tokens.is_border(whole, i) for i in nearer)


def test_a_border_that_is_one_stays() -> None:
    tokens = Tokens(make_tokenizer(), 96)
    for row in ROWS:
        if row.context:
            assert tokens.cut(row.context, row.target) == (row.context, row.target)


def test_answers_are_asked_for_with_the_tokens_of_the_whole_text(tmp_path: Any) -> None:
    """forget_set against a direct computation over whole documents."""
    model = make_model(len(CROSSING)).float()
    rows = [row for row in ROWS if row.context]
    write_rows(tmp_path / "rows.jsonl", rows)
    lm = HFLM(pretrained=model, tokenizer=CROSSING, device="cpu", batch_size=4)
    given = {"tokenizer": CROSSING, "max_length": 96, "forget": str(tmp_path / "rows.jsonl")}
    result = run(lm, ["forget_set"], given, log_samples=True)
    tokens = Tokens(CROSSING, 96)
    for row, sample in zip(rows, result["samples"]["forget_set"], strict=True):
        ids = CROSSING.encode(row.context + row.target)
        start = len(CROSSING.encode(tokens.cut(row.context, row.target)[0]))
        ids, start = ([CROSSING.bos_token_id, *ids], 1) if start == 0 else (ids, start)
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0, start - 1 : -1], -1)
        losses = -logp.gather(-1, torch.tensor(ids[start:])[:, None])
        assert sample["ppl"][0] == pytest.approx(float(losses.sum()), abs=1e-3)
        assert sample["ppl"][1] == len(losses)
