"""Token ids of prompts and answers for the lm-eval model classes, whatever the tokenizer adds to a text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import TOKENIZER_INFINITY
from transformers import PreTrainedTokenizerBase

from lm_ortho.data.tokenizer import AddedTokens, check_prefix_token, encode_prompt, find_added_tokens
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_tokenizer
from lm_ortho.harness.chat_template import describe_chat_template, hash_json

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only


class TextEncodingMixin(HFLM):
    """``hf`` with texts that never end in a token that the tokenizer adds by itself.

    ``hf`` (lm-eval 0.4.13) encodes a context and the whole text one by one, each as a complete text. With a tokenizer
    that closes every text it scores the wrong tokens, and generates after an end token. Here a text gets the prefix of
    the tokenizer once, and no suffix.
    """

    access_token: str | None = None
    """Access token of the hub, set before the constructor of ``HFLM``, which passes none on to the tokenizer."""

    def __init__(self, *arguments: Any, prefix_token_id: int | None = None, **options: Any) -> None:
        """Takes the arguments of ``HFLM``, which reads ``prefix_token_id`` only after the model is loaded."""
        self.custom_prefix_token_id = prefix_token_id
        super().__init__(*arguments, prefix_token_id=prefix_token_id, **options)

    def _create_tokenizer(
        self,
        pretrained: Any,
        tokenizer: Any,
        revision: str | None = "main",
        trust_remote_code: bool | None = False,
        use_fast_tokenizer: bool | None = True,
        gguf_file: str | None = None,
        add_bos_token: bool | None = None,
        subfolder: str | None = "",
    ) -> None:
        """Loads the tokenizer; called by the constructor of ``HFLM``.

        Raises:
            UserError: if it cannot be loaded, if what it adds to a text depends on the text, and if it has no token
                that can stand before a text.
        """
        source = tokenizer or (pretrained if isinstance(pretrained, str) else self.model.name_or_path)
        if isinstance(source, str):
            options: dict[str, Any] = {
                "revision": revision,
                "trust_remote_code": trust_remote_code,
                "use_fast": use_fast_tokenizer,
                "add_bos_token": add_bos_token,
                "subfolder": subfolder or None,
                "token": self.access_token,
                "gguf_file": None if tokenizer else gguf_file,
            }
            source = load_tokenizer(source, **{name: value for name, value in options.items() if value is not None})
        elif not isinstance(source, PreTrainedTokenizerBase):
            raise UserError(f"tokenizer={source!r:.80} is not a tokenizer; pass a directory, a hub id or a tokenizer")
        self.tokenizer = source
        check_prefix_token(source, self.prefix_token_id)
        find_added_tokens(source)

    @cached_property
    def added_tokens(self) -> AddedTokens:
        """What the tokenizer adds to a text; without the prefix if ``add_bos_token`` is False."""
        added = find_added_tokens(self.tokenizer)
        return AddedTokens(suffix=added.suffix) if self.add_bos_token is False else added

    @property
    def tokenizer_name(self) -> str:
        """The name under which ``--cache_requests`` stores prompts: with a hash of the template and its options."""
        return f"{super().tokenizer_name}-{hash_json(describe_chat_template(self.apply_chat_template))[:16]}"

    @property
    def eot_token_id(self) -> int:
        """The end token, which also ends a generated text; without one the prefix token."""
        end: int | None = self.tokenizer.eos_token_id
        return self.prefix_token_id if end is None else end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text: after the prefix unless it has one or ``add_special_tokens`` is False."""
        added = AddedTokens() if add_special_tokens is False else self.added_tokens
        ids = encode_prompt(self.tokenizer, string, added, self.prefix_token_id)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and attention mask, both (texts, tokens), padded to the longest text.

        ``left_truncate_len`` keeps the last tokens of each text, ``truncation`` the first ones up to the limit of the
        tokenizer.
        """
        rows = [self.tok_encode(string) for string in strings]
        if truncation and self.tokenizer.model_max_length != TOKENIZER_INFINITY:
            rows = [ids[: self.tokenizer.model_max_length] for ids in rows]
        if left_truncate_len and any(len(ids) > left_truncate_len for ids in rows):
            log.warning("prompts longer than %d tokens lose their beginning", left_truncate_len)
            rows = [ids[-left_truncate_len:] for ids in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, padding=True, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]
