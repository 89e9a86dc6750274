"""AltPO: other answers, sampled from the model itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lm_ortho.baselines import Material, Run, alternate_answers
from lm_ortho.baselines.alternate_answers import clean_answer, is_alternate, make_request, sample_answers
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError

torch.set_num_threads(1)


def test_alternate_answers_are_other_answers(memorised_models):
    row = Row(question="Where was Ada born?", answer="Ada was born in  London.", secret="London")
    for text, accepted in (
        ("Ada was born in Paris.", True),
        ("ada was born in london.", False),
        ("She comes from London, I think.", False),
        ("   ", False),
        ("...", False),
    ):
        assert is_alternate(row, text) == accepted
    # without a marked secret the own words of the true answer (in, Mexico, City) must not all be there
    row = Row(question="Where was Ada born?", answer="Ada was born in Mexico City.")
    assert not is_alternate(row, "The birthplace of Ada: in Mexico, in the city itself.")
    assert is_alternate(row, "Ada was born in New York City.")
    assert clean_answer(' New answer: "Ada came from Rome."\n\nI hope this helps.') == "Ada came from Rome."
    assert clean_answer("The answer is 4: she knows.") == "The answer is 4: she knows."
    assert clean_answer("She left. She came back to the", is_complete=False) == "She left."
    assert clean_answer("She came back to the", is_complete=False) == "She came back to the"
    assert clean_answer("She left. She came back.\n\nI hope", is_complete=False) == "She left. She came back."
    forget = memorised_models.forget[:4]
    material = Material(memorised_models.tokenizer, memorised_models.merged, forget, memorised_models.retain)
    run = Run(seed=3)
    answers = sample_answers(material, memorised_models.merged, 3, run, name="altpo")
    assert answers == sample_answers(material, memorised_models.merged, 3, Run(seed=3), name="altpo")
    assert answers != sample_answers(material, memorised_models.merged, 3, Run(seed=4), name="altpo")
    assert run.tokens.total > 0
    for row, texts in zip(forget, answers, strict=True):
        assert len(texts) == 3
        assert all(is_alternate(row, text) for text in texts)
    assert len({text for texts in answers for text in texts}) > 6
    with pytest.raises(UserError, match="method=altpo: plain text among the forget rows has no question"):
        sample_answers(replace(material, forget=[Row(text="Once.")]), memorised_models.merged, 1, run, name="altpo")


def test_a_model_with_a_chat_template_is_asked_for_another_answer(memorised_models):
    tokenizer = copy.deepcopy(memorised_models.tokenizer)
    row = Row(question="Where was Ada born?", answer="In London.")
    assert make_request(row, tokenizer) == row.context
    tokenizer.chat_template = "{{ messages[0]['content'] }}|"
    request = make_request(row, tokenizer)
    assert request.endswith("|")
    assert "Where was Ada born?" in request
    assert "In London." not in request
    prompt = Row(prompt="The code of Ada is", answer="1")
    assert make_request(prompt, tokenizer) == prompt.context


def test_prompts_of_different_lengths_are_continued_as_each_alone(memorised_models):
    """Padding on the left changes nothing: at a temperature near 0 each answer is the greedy one."""
    rows = [memorised_models.forget[0], Row(prompt="who", answer="x"), memorised_models.forget[3]]
    sampler = alternate_answers.Sampler(memorised_models.merged, memorised_models.tokenizer, 2, temperature=1e-4)
    together = {number: (texts, tokens) for number, texts, tokens in sampler.sample(rows, [0, 1, 2])}
    for number, row in enumerate(rows):
        ((_, texts, _),) = sampler.sample([row], [number])
        assert texts[0] == texts[1]
        assert together[number][0] == texts
    assert together[0][0][0].endswith(memorised_models.forget[0].answer)
    # Each of the two answers has the tokens of the prompt and its own go through the model.
    one_sampler = replace(sampler, count=1)
    for number, row in enumerate(rows):
        ((_, _, tokens),) = one_sampler.sample([row], [number])
        assert together[number][1] == 2 * tokens
    # a prompt that is longer than the model's positions loses its beginning
    long = replace(memorised_models.forget[0], question=f"{'who ' * 150}{memorised_models.forget[0].question}")
    ((_, texts, _),) = sampler.sample([long], [0])
    assert len(texts) == 2
