"""AltPO: prefers alternate answers, which the model gives itself, to the answers of the forget set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pydantic import Field
from torch import nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv_link, method
from lm_ortho.baselines.preference_optimisation import (
    NpoSettings,
    make_preference_term,
    refuse_plain_text,
    train_with_retain,
)
from lm_ortho.baselines.training import TokenSets, encode_material, learning_rate_grid
from lm_ortho.data.chat import has_chat_template, render_turn
from lm_ortho.data.rows import Row
from lm_ortho.data.tokenizer import encode_prompt, find_added_tokens, find_end_tokens
from lm_ortho.errors import UserError
from lm_ortho.runtime.precision import fast_matmul

TEMPERATURES = (0.7, 1.0, 1.5, 2.25, 3.4)
"""Temperatures of sampling, one after the other, until a row has its alternate answers."""
TOP_P = 0.9
"""Share of the probability from whose tokens each is drawn: a small model wanders off in the rest."""
GENERATION_TOKENS = 8192
"""Largest number of tokens, prompts and answers, that are generated at the same time."""
MAX_PROMPT_TOKENS = 1024
MIN_NEW_TOKENS, MAX_NEW_TOKENS = 16, 256
"""Bounds of the length of an answer, which otherwise may be half as long again as the longest true one."""
REQUEST = "{question} Make up a plausible answer with invented details, in one or two sentences."
"""What a model with a chat template is asked. Unlike in the public code of the paper it is not shown the true answer,
which a model of 135 million parameters copies."""
MAX_REPEATED = 0.7
"""Largest share of the words of the true answer (those that the question does not have) in an alternate one."""


class AltPoSettings(NpoSettings):
    """Settings of AltPO."""

    answers: int = Field(5, ge=1, le=50, description="Number of alternate answers per question.")


_OBJECTIVE = (
    "-2/`beta` mean log sigma(`beta` (log(p / p_merged) of an alternate answer - that of the true answer)) over forget "
    "rows + `retain` * loss per token of retain rows; alternate answers, `answers` per question, are sampled from the "
)
_PAPER = (
    f"alternate preference optimisation of Mekala et al. 2024, {arxiv_link('2409.13474')}: DPO of Rafailov et al. "
    f"2023, {arxiv_link('2305.18290')}, eq. 7, on each pair of answers, with its retain term; scale 2/`beta` as in "
    "open-unlearning"
)
_GRID = learning_rate_grid(retain=(1.0, 4.0))


@method(
    "altpo",
    objective=f"{_OBJECTIVE}merged model",
    paper=_PAPER,
    settings=AltPoSettings,
    grid=_GRID,
    trains=True,
)
def altpo(material: Material, settings: AltPoSettings, run: Run) -> Result:
    """AltPO whose alternate answers come from the model that holds the memory."""
    return _prefer_alternates(material, material.merged, settings, run, "altpo")


@method(
    "altpo_base",
    reads="base",
    objective=f"{_OBJECTIVE}model before fine-tuning",
    paper=_PAPER,
    settings=AltPoSettings,
    grid=_GRID,
    trains=True,
)
def altpo_base(material: Material, settings: AltPoSettings, run: Run) -> Result:
    """AltPO whose alternate answers come from the original model, which never saw the true ones."""
    assert material.base is not None
    return _prefer_alternates(material, material.base, settings, run, "altpo_base")


def _prefer_alternates(material: Material, source: nn.Module, settings: AltPoSettings, run: Run, name: str) -> Result:
    """Trains on pairs of an alternate and the true answer: one for every row and alternate answer, and prompt form."""
    answers = sample_answers(material, source, settings.answers, run, name=name)
    pairs = [(row, alternate) for row, texts in zip(material.forget, answers, strict=True) for alternate in texts]
    alternates = [replace(row, answer=alternate, secret="") for row, alternate in pairs]
    rejected, preferred = (
        encode_material(replace(material, forget=rows)) for rows in ([row for row, _ in pairs], alternates)
    )
    term = make_preference_term(material.merged, preferred.forget, rejected.forget, beta=settings.beta, run=run)
    sets = TokenSets(rejected.forget, rejected.retain)
    result = train_with_retain(material, sets, settings, run, forget=term, stage=name)
    return replace(result, report={"alternate_answers": len(pairs)})


def sample_answers(material: Material, source: nn.Module, count: int, run: Run, *, name: str) -> list[list[str]]:
    """``count`` alternate answers for each forget row, sampled from ``source``, none of them equal to the true one.

    With a chat template the model is asked to make an answer up; otherwise, and for rows without a question, it
    continues the context of the row. An answer that is empty or repeats the true one (``is_alternate``) is sampled
    again, at rising ``TEMPERATURES``. The answers are saved in the folder of the run.

    Raises:
        UserError: for plain text, and for a row without an alternate answer at every temperature.
    """
    refuse_plain_text(material.forget, f"method={name}", "an alternate answer")
    # 1. Load the answers of an interrupted run.
    state_name = f"{name}_answers"
    state = run.resume.load(state_name)
    if state is None:
        # 2. Sample, only for rows that still lack answers.
        state = _sample_until_complete(material, source, count, run, name)
        run.resume.save(state_name, state)
    run.tokens.add_forward(state["tokens"])
    answers: list[list[str]] = state["answers"]
    return answers


def _sample_until_complete(material: Material, source: nn.Module, count: int, run: Run, name: str) -> dict[str, Any]:
    """The answers of all rows, and the number of tokens that went through the model for them."""
    rows, tokens = list(material.forget), 0
    answers: list[list[str]] = [[] for _ in rows]
    device = next(source.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        torch.manual_seed(run.seed)
        for temperature in TEMPERATURES:
            open_rows = [i for i, texts in enumerate(answers) if len(texts) < count]
            if not open_rows:
                break
            sampler = Sampler(source, material.tokenizer, count, temperature)
            for i, texts, token_count in sampler.sample([rows[i] for i in open_rows], open_rows):
                tokens += token_count
                alternates = [text for text in texts if is_alternate(rows[i], text)]
                answers[i] = [*answers[i], *alternates][:count]
                complete = sum(len(texts) == count for texts in answers)
                run.progress(f"{name}: alternate answers", complete, len(rows), f"temperature {temperature:g}")
    empty = [i for i, texts in enumerate(answers) if not texts]
    if empty:
        raise UserError(
            f"method={name}: the model gives no alternate answer to {len(empty)} of {len(rows)} forget rows, first row "
            f"{empty[0] + 1}; leave them out"
        )
    # Rows with some alternate answers repeat them, so that every row counts the same.
    if any(len(texts) < count for texts in answers):
        run.progress(f"{name}: alternate answers", len(rows), len(rows), "some repeated")
    return {"answers": [(texts * count)[:count] for texts in answers], "tokens": tokens}


@dataclass(frozen=True)
class Sampler:
    """Samples ``count`` answers to each row from a model at one temperature."""

    model: nn.Module
    tokenizer: Any
    count: int
    temperature: float

    @torch.no_grad()
    def sample(self, rows: Sequence[Row], numbers: Sequence[int]) -> Iterator[tuple[int, list[str], int]]:
        """Yields the number of each row, its answers, and the tokens that went through the model for them."""
        # 1. Encode the prompts, and batch them by length.
        added = find_added_tokens(self.tokenizer)
        end = find_end_tokens(self.tokenizer, added)
        true_lengths = [len(self.tokenizer.encode(row.answer, add_special_tokens=False)) for row in rows]
        new_tokens = min(MAX_NEW_TOKENS, max(MIN_NEW_TOKENS, 3 * max(true_lengths, default=0) // 2))
        # A prompt that leaves no room for the answer loses its beginning.
        positions = getattr(cast(Any, self.model).config, "max_position_embeddings", None) or MAX_PROMPT_TOKENS
        new_tokens = min(new_tokens, positions // 2)
        longest = min(MAX_PROMPT_TOKENS, positions - new_tokens)
        requests = [make_request(row, self.tokenizer) for row in rows]
        prompts = [encode_prompt(self.tokenizer, request, added)[-longest:] for request in requests]
        batch: list[int] = []
        batches = [batch]
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if batch and (len(batch) + 1) * self.count * (len(prompts[i]) + new_tokens) > GENERATION_TOKENS:
                batch = []
                batches.append(batch)
            batch.append(i)
        # 2. Generate, with the prompts padded on the left: a row's answers follow one another.
        device = next(self.model.parameters()).device
        for batch in batches:
            width = max((len(prompts[i]) for i in batch), default=0)
            if not width:
                continue
            padding = [width - len(prompts[i]) for i in batch]
            ids = torch.tensor([[0] * pad + prompts[i] for i, pad in zip(batch, padding, strict=True)], device=device)
            mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding], device=device)
            with fast_matmul(device.type):
                output = cast(Any, self.model).generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=new_tokens,
                    do_sample=True,
                    temperature=self.temperature,
                    top_k=0,
                    top_p=TOP_P,
                    num_return_sequences=self.count,
                    eos_token_id=list(end) or None,
                    pad_token_id=end[0] if end else 0,
                )
            # 3. Cut each answer at its end token.
            sequences = output[:, width:].tolist()
            for place, i in enumerate(batch):
                generated = [_cut(tokens, end) for tokens in sequences[place * self.count : (place + 1) * self.count]]
                texts = [
                    clean_answer(self.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens) < new_tokens)
                    for tokens in generated
                ]
                yield numbers[i], texts, self.count * len(prompts[i]) + sum(map(len, generated))


def _cut(tokens: list[int], end: Sequence[int]) -> list[int]:
    """The tokens up to the first of the end tokens."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in end), len(tokens))]


def make_request(row: Row, tokenizer: Any) -> str:
    """The prompt after which the model writes an alternate answer."""
    if row.question and not row.prompt and has_chat_template(tokenizer):
        return render_turn(Row(question=REQUEST.format(question=row.question)), tokenizer).context
    return row.context


def clean_answer(text: str, is_complete: bool = True) -> str:
    """The first paragraph of a generated text, without a label such as *New answer:* and without quotation marks.

    Of a text that is not complete the last sentence is left out, unless it is the only one.
    """
    paragraph, _, rest = text.strip().partition("\n\n")
    answer = re.sub(r"^[\w ]{0,30}answer\s*:\s*", "", paragraph, flags=re.IGNORECASE).strip().strip('"').strip()
    sentences = re.match(r"(.*[.!?])\s", answer, flags=re.DOTALL)
    return sentences[1] if sentences and not is_complete and not rest else answer


def is_alternate(row: Row, text: str) -> bool:
    """Whether ``text`` is an answer other than the true one: without its secret, and with few of its own words.

    The own words of an answer are those that the question (or prompt) does not have.
    """
    question, answer, other = (set(re.findall(r"\w+", part.casefold())) for part in (row.context, row.answer, text))
    own_words = answer - question or answer
    repeated = len(own_words & other) / max(1, len(own_words))
    has_secret = bool(row.secret) and " ".join(row.secret.split()).casefold() in " ".join(text.split()).casefold()
    return bool(other) and repeated <= MAX_REPEATED and not has_secret
