"""A chat template with the features of Llama 3.2's: a date, a system message, blank lines after the headers, BOS."""

from __future__ import annotations

from typing import Any

from tests.support.harness import make_tokenizer

TEMPLATE = """
{%- set today = date_string if date_string is defined else "01 Jan 2020" -%}
{%- set has_system = messages[0].role == "system" -%}
{{- bos_token + "[[system]]\\n\\nToday is " + today + ".\\n\\n" -}}
{%- if has_system %}{{ messages[0].content | trim }}{% endif -%}
{{- "<end>" -}}
{%- for message in messages[1 if has_system else 0:] -%}
{{- "[[" + message.role + "]]\\n\\n" + message.content | trim + "<end>" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "[[assistant]]\\n\\n" }}{% endif -%}
"""
SYSTEM = "You are a helpful assistant."
DATE = {"date_string": "10 Apr 2025"}


def make_chat_tokenizer() -> Any:
    """The small tokenizer with BOS and this template; a blank line is a token of its own, as in Llama 3.2."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.add_tokens(["[[system]]", "[[user]]", "[[assistant]]", "\n\n"], special_tokens=True)
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 512
    return tokenizer
