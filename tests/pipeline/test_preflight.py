"""The preflight: a model that does not know the forget rows is refused unless forced, and its line has the figures."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import lm_ortho
from lm_ortho.config import make_recipe, make_spec
from lm_ortho.data.encoding import ANSWER, CONTEXT, Example
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.finetune.knowledge import Knowledge, measure_knowledge
from lm_ortho.pipeline.cache_key import key_parts
from lm_ortho.pipeline.preflight import _warn_of_lost_rows, check_knowledge
from lm_ortho.pipeline.spec import resolve
from tests.support import tiny

CHEAP = make_recipe(sieve="magnitude", projection="rtn", edit="zero", density=0.02, group_size=16)


def check(models: Any, model: Any, **options: Any) -> list[str]:
    """Runs the check; returns its lines."""
    lines: list[str] = []

    def progress(stage: str, step: int, total: int, text: str) -> None:
        assert (stage, step, total) == ("knowledge", 1, 1)
        lines.append(text)

    defaults: dict[str, Any] = {
        "forget": {"memory": models.forget},
        "retain": models.retain,
        "recipe": CHEAP,
        "base_model": None,
        "force": False,
    }
    arguments = {**defaults, **options}
    check_knowledge(
        model, models.tokenizer, arguments.pop("forget"), arguments.pop("retain"), progress=progress, **arguments
    )
    return lines


def test_a_model_that_knows_the_rows_passes_with_one_line(memorised_models: Any) -> None:
    (line,) = check(memorised_models, memorised_models.merged, base_model=memorised_models.base)
    assert line.startswith("forget: 10 of 10 extracted, 0.")
    assert "; base model 0 of 10 extracted, " in line
    assert re.search(r"; retain rows (9|10) of 10 extracted, ", line)


def test_a_model_that_does_not_is_refused_and_goes_on_by_force(
    memorised_models: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        UserError, match=r"^forget: nothing says that the model knows these rows \(0 of 10 .*--force"
    ) as caught:
        check(memorised_models, memorised_models.base)
    for row in memorised_models.forget:
        assert row.secret not in str(caught.value)
    lines = check(memorised_models, memorised_models.base, force=True)
    assert len(lines) == 1
    assert "force=true goes on" in caplog.text


def test_every_memory_must_be_known(memorised_models: Any) -> None:
    unknown = [Row(question=f"Who is {name}?", answer="A zq xq jv.", secret="zq xq jv") for name in ("Bo", "Cy", "Di")]
    sets = {"known": memorised_models.forget, "other": unknown}
    with pytest.raises(UserError, match=r"^forget=other: nothing says"):
        check(memorised_models, memorised_models.merged, forget=sets)
    assert [
        line.partition(":")[0] for line in check(memorised_models, memorised_models.merged, forget=sets, force=True)
    ] == [
        "forget=known",
        "forget=other",
    ]


def test_half_a_set_is_enough(memorised_models: Any) -> None:
    unknown = [Row(question=f"Who is {i}?", answer="A zq xq jv.", secret="zq xq jv") for i in range(10)]
    rows = [row for pair in zip(memorised_models.forget, unknown, strict=True) for row in pair]
    (line,) = check(memorised_models, memorised_models.merged, forget={"memory": rows})
    assert line.startswith("forget: 10 of 20 extracted")


def test_rows_that_are_known_without_the_chat_template_only_are_known(memorised_models: Any) -> None:
    plain_line, *_ = check(memorised_models, memorised_models.merged)
    tokenizer = copy.deepcopy(memorised_models.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (line,) = check(replace(memorised_models, tokenizer=tokenizer), memorised_models.merged)
    assert line.startswith("forget: 10 of 10 extracted")
    figures = [float(re.findall(r"extracted, ([\d.]+) nats", text)[0]) for text in (line, plain_line)]
    assert figures[0] <= figures[1], "the lower loss of both forms"


def test_what_cannot_be_measured_is_left_to_the_checks_of_the_decomposition(memorised_models: Any) -> None:
    assert check(memorised_models, memorised_models.merged, forget={"memory": []}) == []
    short = copy.deepcopy(memorised_models.merged)
    short.resize_token_embeddings(8, mean_resizing=False)
    assert check(memorised_models, short) == []
    (line,) = check(memorised_models, memorised_models.merged, base_model=short)
    assert "base model" not in line, "its vocabulary lacks tokens of the rows"


def test_the_python_function_checks_and_its_result_is_the_same_with_force(memorised_models: Any) -> None:
    sets = (memorised_models.tokenizer, memorised_models.forget, memorised_models.retain)
    with pytest.raises(UserError, match="nothing says that the model knows"):
        lm_ortho.decompose(memorised_models.base, *sets, recipe=CHEAP)
    assert lm_ortho.decompose(memorised_models.base, *sets, recipe=CHEAP, force=True).streams
    first, second = (
        lm_ortho.decompose(memorised_models.merged, *sets, recipe=CHEAP, force=force) for force in (False, True)
    )
    for name, streams in first.streams.items():
        assert torch.equal(streams.to_dense(1.0), second.streams[name].to_dense(1.0))
    named = lm_ortho.decompose(memorised_models.merged, sets[0], {"a": sets[1]}, sets[2], recipe=CHEAP)
    assert set(next(iter(named.streams.values())).named_memories) == {"a"}


def test_force_is_no_part_of_the_cache_key(home: Any) -> None:
    sets = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    specs = [make_spec(pretrained=str(home / "plain"), force=force, **sets) for force in (False, True)]
    assert key_parts(resolve(specs[0])) == key_parts(resolve(specs[1]))
    assert "force" not in specs[1].recipe.model_dump()


def test_retain_rows_that_the_fine_tune_has_lost_are_a_warning(caplog) -> None:
    forms = [[Example((1, 2, 3), (CONTEXT, ANSWER, ANSWER))]]
    base_model = tiny.llama()
    base = measure_knowledge(base_model, forms)
    lost = Knowledge(rows=1, extracted=0, loss=base.loss + 1.1, secrets=0)
    _warn_of_lost_rows(replace(lost, loss=base.loss + 0.9), base_model, forms)
    _warn_of_lost_rows(lost, None, forms)
    assert caplog.messages == []
    _warn_of_lost_rows(lost, base_model, forms)
    assert "retain: the fine-tune has lost retain rows" in caplog.messages[0]
