"""Metadata and tokenizer of the small checkpoint that tests read, and a comparison of two models."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.support import tiny

META = {"recipe": {"density": 0.05, "sieve": "attribution"}, "report": {"steps": [1, 2], "note": "ü"}}


def tokenizer():
    vocabulary = {f"w{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))


def assert_same_model(one, other, alphas=(0.0, 0.5, 1.0)):
    for alpha in alphas:
        assert torch.equal(tiny.logits_at(one, alpha), tiny.logits_at(other, alpha))
