"""Fuzzes chat templates: code in a small language that comes with the tokenizer of a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from unittest import mock

from lm_ortho.data import chat
from lm_ortho.data.chat import ChatRow, render_forms
from lm_ortho.data.rows import Row
from tests.fuzz.oracle import ODD_TEXTS, ODD_VALUES, REFUSED, RIGHT, Refusal, attempt, fuzz_case, mutate
from tests.support.harness import ROWS, make_tokenizer

SECRETS = [row.answer for row in ROWS if row.answer]
SECONDS = 0.2
"""Processor time of a template here; a right one needs a thousandth of it."""

VALID: dict[str, Callable[[str], str]] = {
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<bot>\n{% endif %}": lambda question: f"<s><user>\n{question}\n<bot>\n",
    "{% for m in messages %}{{ '[INST] ' + (m['content'] | trim) + ' [/INST]' }}{% endfor %}": (
        lambda question: f"[INST] {question.strip()} [/INST]"
    ),
    "{% set ns = namespace(first=true) %}{% for m in messages %}{% if ns.first %}{% set ns.first = false %}"
    "{{ bos_token }}{% endif %}{{ m.role | upper }}: {{ m.content }}{{ eos_token }}{% endfor %}BOT:": (
        lambda question: f"<s>USER: {question}<end>BOT:"
    ),
    "{%- macro turn(role, text) -%}{{ '<|' + role + '|>' + text }}{%- endmacro -%}"
    "{{- turn('user', messages[-1].content) -}}{{- '<|assistant|>' -}}": (
        lambda question: f"<|user|>{question}<|assistant|>"
    ),
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "Q {{ messages[0]['content'] }} A ": (
        lambda question: f"Q {question} A "
    ),
    "{{ messages[0].content | upper }}: ": lambda question: f"{question.upper()}: ",
    "{{ messages[0].content }} {{ messages[0].content }}": lambda question: f"{question} {question}",
}  # fmt: skip
"""Templates with what they must make of a question."""

HOSTILE = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}", "{{ messages.append(1) }}", "{{ messages[0].update({'content': 'x'}) }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}", "{{ lipsum() }}", "{{ config }}",
    "{{ raise_exception('\x1b[31m\nred\u202e') }}", "{{ raise_exception(messages) }}", "{{ raise_exception(3) }}",
    "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ undefined.name }}", "{% break %}", "{{ '\ud800' }}", "{{ '\x00' }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% for x in range(10**9) %}{{ x }}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ dict(**{'a': 1}) }}", "{{ 'a' * 300000 }}", "{{ strftime_now('%Y') }}", "{{ strftime_now('\ud800') }}",
    "{% generation %}x{% endgeneration %}", "{{ messages | tojson }}", "{{ '%s' % messages }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ messages[0].content[::-1] }}", "{{ messages[0].content | length }}", "{{ 1.0e400 | int }}",
    "{{ ('9' * 5000) | int }}",
    "{% for k in messages[0] %}{{ k }}{% endfor %}", "{% set messages = [] %}", "{{ caller() }}", "{{ joiner }}",
    "{{ [1, 2] | random }}",
    "{% raw %}{{ x }}{% endraw %}", "{# comment", "{%", "{{", "}}", "%}", "{{ 'x' | nofilter }}", "{% nosuchtag %}",
    "{{ x.y.z }}",
)  # fmt: skip
SLOW = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
)


@lru_cache(maxsize=1)
def read_tokenizer() -> Any:
    """One tokenizer for all cases of a process."""
    return make_tokenizer(bos=True)


# --- Mutators --------------------------------------------------------------------------------------------------------


def insert_hostile(draw: random.Random, template: str) -> str:
    place = draw.choice([0, len(template), draw.randint(0, len(template))])
    return template[:place] + draw.choice(HOSTILE) + template[place:]


def insert_odd_text(draw: random.Random, template: str) -> str:
    place = draw.randint(0, len(template))
    return template[:place] + draw.choice(ODD_TEXTS) + template[place:]


def drop_span(draw: random.Random, template: str) -> str:
    start = draw.randint(0, len(template))
    return template[:start] + template[start + draw.randint(1, 12) :]


def swap_words(draw: random.Random, template: str) -> str:
    words = [
        "content",
        "role",
        "messages",
        "m",
        "user",
        "trim",
        "upper",
        "bos_token",
        "endfor",
        "if",
        "{%",
        "%}",
        "{{",
        "}}",
        ".",
    ]
    return template.replace(
        draw.choice(words), draw.choice([*words, "lower", "title", "reverse", "x", ""]), draw.choice([1, -1])
    )


def change_content(draw: random.Random, template: str) -> str:
    """Transforms the user's message."""
    change = draw.choice(
        [
            "| upper",
            "| trim",
            "| reverse",
            "| replace(' ', '')",
            "[:3]",
            "| e",
            "| tojson",
            "| title",
            "| center(200)",
            "+ 'x'",
            "* 2",
        ]
    )
    return template.replace("content", f"content {change}" if change[0] in "|+*" else f"content{change}")


def replace_template(draw: random.Random, template: str) -> str:
    return draw.choice([*HOSTILE, *ODD_TEXTS])


MUTATORS = [insert_hostile, insert_hostile, insert_odd_text, drop_span, swap_words, change_content, replace_template]


# --- Cases -----------------------------------------------------------------------------------------------------------


@fuzz_case
def run_case(seed: int) -> str:
    """Renders rows. Raises ``AssertionError`` unless each has its question and answer, or all are refused."""
    draw = random.Random(seed)
    tokenizer = read_tokenizer()
    rows = draw.sample(ROWS, draw.randint(1, len(ROWS)))
    template, expected = draw.choice(list(VALID.items()))
    form = draw.choice(["chat", "both", "auto"])
    with mock.patch.object(chat, "MAX_SECONDS", SECONDS):
        if draw.random() < 0.2:
            tokenizer.chat_template = template if draw.random() < 0.8 else {"default": template, "tool_use": "{{ x }}"}
            result = attempt(lambda: render_forms(rows, tokenizer, form), names=[])
            assert not isinstance(result, Refusal), f"a right template is refused: {result}"
            turns = [row for row in result if isinstance(row, ChatRow)]
            questions = [row for row in rows if row.question]
            assert [turn.context for turn in turns] == [expected(row.question) for row in questions]
            _check_rows(rows, result, form)
            return RIGHT
        template = mutate(draw, template, MUTATORS)
        if draw.random() < 0.005:
            template = draw.choice(SLOW) + template
        tokenizer.chat_template = template if draw.random() < 0.97 else _odd_template(draw, template)
        if draw.random() < 0.03:
            form = draw.choice([value for value in ODD_TEXTS if value])
        result = attempt(lambda: render_forms(rows, tokenizer, form), names=["prompts"], secrets=SECRETS)
        if isinstance(result, Refusal):
            return REFUSED
        _check_rows(rows, result, form)
        return RIGHT


def _odd_template(draw: random.Random, template: str) -> Any:
    """A template of another type than text."""
    return draw.choice([
        {"default": template}, {"tool_use": template}, {}, {"default": None}, [template], [{"name": "default",
        "template": template}],
        template.encode("utf-8", "replace"), *ODD_VALUES,
    ])  # fmt: skip


def _check_rows(rows: list[Row], result: list[Row], form: str) -> None:
    """The plain rows are unchanged; every turn holds the question, ends with the same answer, and is valid text."""
    turns = [row for row in result if isinstance(row, ChatRow)]
    others = [row for row in result if not isinstance(row, ChatRow)]
    with_question = [row for row in rows if row.question and not row.prompt]
    assert others == (rows if form != "chat" or not turns else [row for row in rows if row not in with_question])
    assert not turns or [turn.question for turn in turns] == [row.question for row in with_question]
    for turn, row in zip(turns, with_question, strict=False):
        turn.context.encode()
        words, text = (" ".join(part.split()).casefold() for part in (row.question, turn.context))
        assert words in text, "a prompt without its question"
        assert (turn.target, turn.secret, turn.subject) == (row.answer, row.secret, row.subject)
