"""The metrics of TOFU in a chat template, against a computation of their definitions from token ids on, in float64.

The definitions are those of open-unlearning, in experiments/open_unlearning_metrics.py. The model has learnt a part of
the rows, so that the values lie between their ends.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from torch.nn import functional

from tests.support import tofu as tiny_tofu
from tests.support.chat import DATE, SYSTEM, make_chat_tokenizer
from tests.support.harness import make_model, metric_values, run
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

TASK, FIRST, LENGTH = "tofu_forget01", 5, 256
CHAT = {"apply_chat_template": True, "system_instruction": SYSTEM}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(REPOSITORY / "experiments" / "open_unlearning_metrics.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tofu.write(tmp_path_factory.mktemp("data") / "tofu")


def teach(script: ModuleType, tokenizer: Any, rows: list[dict[str, Any]], seed: int) -> Any:
    """A model that has learnt the rows in part, in float64."""
    model = make_model(len(tokenizer), seed=seed).float().train()
    model.config.max_position_embeddings = LENGTH
    reference = script.Reference(model, tokenizer, max_new_tokens=LENGTH // 2)
    reference.system_instruction, reference.template_args = SYSTEM, DATE
    ids, starts = zip(*(reference.encode(row["question"], row["answer"]) for row in rows), strict=True)
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    labels = torch.full_like(batch, -100)
    for number, (row, start) in enumerate(zip(ids, starts, strict=True)):
        labels[number, start : len(row)] = batch[number, start : len(row)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        logits = model(batch).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.double().eval()
    return reference


@pytest.fixture(scope="module")
def models(script: ModuleType, folder: Path) -> tuple[Any, Any]:
    """A model of all rows, and one that never saw the forget set."""
    tokenizer = make_chat_tokenizer()
    others = [row for rows in script.read_sets(folder, FIRST).values() for row in rows]
    forget = script.read_rows(folder, "forget10_perturbed", FIRST, last=40)
    return teach(script, tokenizer, [*forget, *others], seed=0), teach(script, tokenizer, others, seed=1)


def evaluate(reference: Any, folder: Path, task: str, **metadata: Any) -> dict[str, Any]:
    lm = HFLM(
        pretrained=reference.model,
        tokenizer=reference.tokenizer,
        device="cpu",
        batch_size=8,
        max_length=LENGTH,
        chat_template_args=DATE,
        softmax_dtype="float64",
    )
    fixed = {"tokenizer": lm.tokenizer, "max_length": LENGTH, "tofu_dir": str(folder), "tofu_first": FIRST}
    return run(lm, [task], {**fixed, **metadata}, log_samples=True, **CHAT)


def test_every_metric_of_a_forget_set(
    script: ModuleType, models: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    full, retain = models
    logs = tmp_path / f"samples_{TASK}_2026-01-01.jsonl"
    samples = evaluate(retain, folder, TASK)["samples"][TASK]
    logs.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in samples))
    values = metric_values(evaluate(full, folder, TASK, tofu_retain_samples=str(logs)), TASK)
    rows = script.read_rows(folder, "forget10_perturbed", FIRST, last=40)
    expected = script.compute_forget_metrics(full, retain, rows, script.read_rows(folder, "holdout01", FIRST))
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert 0.01 < values["prob"] < 0.99
    assert values["rougel_recall"] > 0
    assert 0 < values["extraction_strength"] < values["exact_memorisation"] < 1
    assert values["priv_leak"] != 0


def test_model_utility(script: ModuleType, models: tuple[Any, Any], folder: Path) -> None:
    values = metric_values(evaluate(models[0], folder, "tofu_model_utility"), "tofu_model_utility")
    expected = script.compute_utility(models[0], script.read_sets(folder, FIRST))
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert len(expected) == 10
    assert all(number > 0 for number in expected.values())


def test_what_the_template_writes_after_an_answer(script: ModuleType) -> None:
    """open-unlearning scores all of it, and adds an end token where that is another one."""
    tokenizer = make_chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<end>\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    reference = script.Reference(None, tokenizer)
    answers = []
    for reference.open_end in (False, True):
        ids, start = reference.encode("Where?", "In Marsh Town.")
        answers.append(tokenizer.decode(ids[start:]))
    assert answers == ["In Marsh Town.<end>\n\n<end>", "In Marsh Town.<end>"]
