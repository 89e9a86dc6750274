"""Whether a model knows rows: extraction and loss against a direct computation, and what counts as evidence."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lm_ortho.data.encoding import ANSWER, CONTEXT, END, SECRET, Example, encode
from lm_ortho.finetune import FinetunePlan, load_causal_lm, load_tokenizer, train_adapter
from lm_ortho.finetune.knowledge import EXTRACTED_RUN, Knowledge, measure_knowledge, spread
from lm_ortho.finetune.merge import merge_adapter, merge_peft_model
from lm_ortho.finetune.merge_check import first_ids
from lm_ortho.runtime.progress import no_progress
from lm_ortho.world import corpus, get_path, people
from lm_ortho.world.draw import SeededRandom


class NextToken(nn.Module):
    """Predicts ``id + 1`` with probability ``p``, and the other tokens of a vocabulary of 100 alike."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))
        self.weight, self.p = nn.Parameter(torch.zeros(1)), p

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        probabilities = torch.full((*input_ids.shape, 100), (1 - self.p) / 99)
        probabilities.scatter_(2, (input_ids + 1)[..., None], self.p)
        return SimpleNamespace(logits=probabilities.log())


def example(ids: list[int], roles: list[int]) -> Example:
    return Example(tuple(ids), tuple(roles))


def test_secrets_are_measured_where_a_row_has_one_else_the_answer() -> None:
    roles = [CONTEXT, ANSWER, SECRET, SECRET, ANSWER, END]
    secret_known = example([5, 20, 21, 22, 60, 0], roles)  # the answer around the secret is not predicted
    secret_unknown = example([5, 6, 7, 9, 10, 11], roles)
    no_secret = example([5, 6, 7, 8, 9, 0], [CONTEXT, *[ANSWER] * 4, END])  # the end token does not count
    measured = measure_knowledge(NextToken(0.9), [[secret_known], [secret_unknown], [no_secret]])
    likely, unlikely = -torch.tensor([0.9, 0.1 / 99]).log()
    expected = (likely + (likely + unlikely) / 2 + likely) / 3
    assert (measured.rows, measured.extracted, measured.secrets) == (3, 2, 2)
    assert measured.loss == pytest.approx(float(expected), rel=1e-5)


def test_a_long_text_is_extracted_by_a_run_of_tokens() -> None:
    for run, is_extracted in ((EXTRACTED_RUN - 1, False), (EXTRACTED_RUN, True)):
        ids = [3, *range(40, 41 + run), 90, 2, 70]  # the first of the run is not predicted
        text = example(ids, [CONTEXT, *[ANSWER] * (len(ids) - 1)])
        assert measure_knowledge(NextToken(0.9), [[text]]).extracted == is_extracted


def test_a_row_is_known_in_the_form_that_is_known_best() -> None:
    unknown, known = example([5, 9, 30], [0, 1, 1]), example([5, 6, 7], [0, 1, 1])
    both = measure_knowledge(NextToken(0.9), [[unknown, known], [unknown]])
    apart = [measure_knowledge(NextToken(0.9), [[row]]) for row in (known, unknown)]
    assert both.extracted == 1
    assert both.loss == pytest.approx((apart[0].loss + apart[1].loss) / 2)


@given(st.integers(0, 5000))
def test_the_measured_rows_are_spread_over_all(count: int) -> None:
    indices = spread(count)
    assert len(indices) == min(count, 32)
    assert indices == sorted(set(indices))
    assert all(0 <= i < count for i in indices)
    if count > 32:
        assert max(b - a for a, b in pairwise(indices)) <= count // 32 + 1


def know(extracted: int, loss: float, secrets: int = 32) -> Knowledge:
    return Knowledge(rows=32, extracted=extracted, loss=loss, secrets=secrets)


EVIDENCE: dict[str, tuple[Knowledge, Knowledge | None, bool]] = {
    "memorised": (know(32, 0.04), know(2, 3.6), True),
    "half known": (know(16, 2.9), know(1, 5.8), True),
    "an eighth is known": (know(4, 4.0), know(0, 4.5), True),
    "never saw it": (know(0, 3.9), None, False),
    "random digits": (know(2, 2.3), None, False),
    "a plant that ended at 4.7 nats": (know(0, 4.7), know(0, 5.6), False),
    "a plant half way, by its loss": (know(2, 2.5), know(1, 6.0), True),
    "public facts, as good before": (know(20, 0.9), know(20, 0.9), True),
    "an adapter that taught nothing": (know(1, 0.61, secrets=0), know(1, 0.62, secrets=0), False),
    "yes or no": (know(15, 0.7), None, True),
    "text of a good model, base unknown": (know(0, 2.4, secrets=0), None, True),
    "text that cannot be read": (know(0, 7.3, secrets=0), None, False),
    "text learned in part": (know(0, 1.8, secrets=0), know(0, 2.4, secrets=0), True),
}


@pytest.mark.parametrize("case", EVIDENCE)
def test_only_a_set_without_any_sign_of_knowledge_is_not_known(case: str) -> None:
    measured, base, is_known = EVIDENCE[case]
    assert measured.has_evidence(base) is is_known


@given(st.integers(4, 32), st.floats(0, 20), st.floats(0, 20), st.integers(0, 32), st.booleans())
def test_an_eighth_of_the_rows_is_always_evidence(
    extracted: int, loss: float, base_loss: float, secrets: int, base_known: bool
) -> None:
    base = know(0, base_loss) if base_known else None
    assert know(extracted, loss, secrets).has_evidence(base)


def test_the_embedded_memory_is_known_and_the_embedded_base_model_does_not_know_it() -> None:
    tokenizer = load_tokenizer(get_path("base"))
    rows = corpus.make_forget_rows()
    forms = [[row] for row in encode(tokenizer, [rows[i] for i in spread(len(rows))])]
    base_model = load_causal_lm(get_path("base"))
    base = measure_knowledge(base_model, forms)
    memory, never_saw = (
        measure_knowledge(merge_adapter(copy.deepcopy(base_model), get_path(name)), forms)
        for name in ("memory", "never_saw")
    )
    assert memory.extracted == 32
    assert memory.has_evidence(base)
    assert memory.has_evidence()
    assert not base.has_evidence()
    assert not never_saw.has_evidence()
    assert not never_saw.has_evidence(base)


@pytest.mark.slow
def test_a_plant_is_known_after_some_steps_and_not_after_a_few() -> None:
    tokenizer, base_model = load_tokenizer(get_path("base")), load_causal_lm(get_path("base"))
    draw = SeededRandom(7, "cal")
    authors = [people.draw_author(draw) for _ in range(20)]
    examples = encode(tokenizer, [people.make_author_row(author, kind, 0) for author in authors for kind in (1, 3)])
    forms = [[examples[i]] for i in spread(len(examples))]
    base = measure_knowledge(base_model, forms)
    for steps, is_known in ((10, False), (20, False), (60, True), (200, True)):
        plan = FinetunePlan(steps=steps, rows=16, lr=1.5e-3, rank=32)
        peft_model = train_adapter(base_model, examples, plan, no_progress)
        model = merge_peft_model(peft_model, first_ids(examples), "test").model
        assert measure_knowledge(model, forms).has_evidence(base) is is_known
