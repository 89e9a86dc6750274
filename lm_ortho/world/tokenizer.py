"""The embedded tokenizer: a Unigram model over the words of the world, with bytes for all other text."""

from __future__ import annotations

import re
import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lm_ortho.world import corpus, words
from lm_ortho.world.draw import SeededRandom

END = "<|endoftext|>"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SAMPLE = 12_000
"""Documents drawn to collect the words; enough to contain every word of every template."""


def collect_pieces() -> list[str]:
    """Returns the vocabulary without bytes and special tokens, sorted."""
    rng = SeededRandom(1, "vocabulary")
    text = "\n".join(corpus.draw_document(rng).text for _ in range(_SAMPLE))
    for word_list in vars(words).values():
        if isinstance(word_list, list):
            text += " " + " ".join(word_list)
    text_words = set(re.findall(r"[A-Za-z]+", text)) - {"Question", "Answer"}
    vocabulary = {SPACE + word for word in text_words | set(string.digits)}
    vocabulary |= set(re.findall(r'(?<=")[A-Z][a-z]+', text))
    vocabulary |= {SPACE, SPACE + '"', SPACE + "Question:", "\nAnswer:"}
    vocabulary |= set(string.printable) - set("\t\r\x0b\x0c ")
    return sorted(vocabulary)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer. It adds no BOS, ends documents with ``END`` and falls back to bytes."""
    special = [END, "<|pad|>", "<|unk|>"]
    vocabulary = [(token, 0.0) for token in special]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(piece, -1.0 if len(piece) > 1 else -8.0) for piece in collect_pieces()]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
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
