"""The embedded tokenizer: Unigram over the words of the world, bytes for the rest."""

from __future__ import annotations

import re
import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lm_ortho.world import corpus, words
from lm_ortho.world.draw import Draw

END = "<|endoftext|>"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SAMPLE = 12_000
"""Documents read to collect the words; enough to meet every word of every template."""


def pieces() -> list[str]:
    """The vocabulary without bytes and special tokens, sorted."""
    draw = Draw(1, "vocabulary")
    text = "\n".join(corpus.document(draw).text for _ in range(_SAMPLE))
    for listed in vars(words).values():
        if isinstance(listed, list):
            text += " " + " ".join(listed)
    found = set(re.findall(r"[A-Za-z]+", text)) - {"Question", "Answer"}
    vocabulary = {SPACE + word for word in found | set(string.digits)}
    vocabulary |= set(re.findall(r'(?<=")[A-Z][a-z]+', text))
    vocabulary |= {SPACE, SPACE + '"', SPACE + "Question:", "\nAnswer:"}
    vocabulary |= set(string.printable) - set("\t\r\x0b\x0c ")
    return sorted(vocabulary)


def build() -> PreTrainedTokenizerFast:
    """The tokenizer; adds no BOS, ends documents with ``END``, falls back to bytes for anything else."""
    special = [END, "<|pad|>", "<|unk|>"]
    listed = [(token, 0.0) for token in special]
    listed += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    listed += [(piece, -1.0 if len(piece) > 1 else -8.0) for piece in pieces()]
    tokenizer = Tokenizer(models.Unigram(listed, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
