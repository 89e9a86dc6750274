"""TOFU-1000: the whole command on a tiny model, its bars, its counter of operations and its rows."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.support import harness, tiny, tofu
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
        yield load_script(REPOSITORY / "experiments" / "tofu_1000.py")


@pytest.fixture(scope="module")
def tofu_folder(tmp_path_factory):
    return tofu.write_authors(tmp_path_factory.mktemp("data") / "tofu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, script):
    """A model of one block, and a tokenizer of the words of the data with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    rows = [tofu.author_row(number) for number in range(tofu.FULL_ROWS)]
    texts = [text for row in rows for text in row.values()] + [script.SYSTEM_INSTRUCTION, "It was Capital of So . ? :"]
    tokenizer = harness.train_tokenizer(texts)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 128}
    tiny.llama(vocab_size=len(tokenizer), initializer_range=0.05, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Rows


def test_the_rows_are_those_of_the_protocol(script, tofu_folder):
    rows = script.read_tofu(tofu_folder)
    numbers = list(rows.planted)
    assert numbers == [*range(900), *range(3900, 4000)]
    assert len(rows.select(script.RETAIN, without=script.LEFT_OUT)) == 700
    assert [row.answer for row in rows.select(script.FORGET)] == [
        tofu.author_row(n)["answer"] for n in range(3900, 4000)
    ]
    sets = [rows.never_taught, rows.invented, rows.select(script.FORGET), rows.select(script.RETAIN)]
    subjects = [{row.subject for row in part} for part in sets]
    assert [len(names) for names in subjects] == [5, 5, 5, 45]
    assert len(set.union(*subjects)) == 60, "no author is in two sets"
    assert all(row.mentions_subject and row.group == row.subject for part in sets for row in part)
    assert len(script.read_tofu(tofu_folder, first=2).planted) == 100


def test_the_tuning_reads_no_row_that_is_forgotten_or_measured(script):
    tuned = {*script.TUNING_FORGET, *script.TUNING_HELD_OUT}
    assert not tuned & {*script.MEASURED, *range(3900, 4000)}
    assert set(script.LEFT_OUT) <= set(script.MEASURED)


def test_the_chat_has_the_system_prompt_and_ends_with_the_answer(script, tofu_folder, words, monkeypatch):
    monkeypatch.setattr(words, "chat_template", TEMPLATE)
    row = script.read_tofu(tofu_folder, 1).planted[0]
    (chat,) = script.render_chat([row], words)
    assert chat.context == f"<system>{script.SYSTEM_INSTRUCTION}<user>{row.question}<bot>"
    assert (chat.subject, chat.answer) == (row.subject, row.answer)


# Operations


def test_operations_are_two_for_each_weight_and_token_and_six_with_the_backward_pass(script, words):
    model = tiny.llama(vocab_size=len(words)).requires_grad_(True)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    ids = torch.randint(0, 99, (3, 8), generator=torch.Generator().manual_seed(0))
    with script.OperationCounter() as forward, torch.no_grad():
        model(input_ids=ids)
    with script.OperationCounter() as both:
        model(input_ids=ids).logits.sum().backward()
    attention = 2 * 2 * 2 * 8 * 64 * ids.numel()  # 2 blocks, 2 products of 8 keys with a width of 64
    assert forward.operations == pytest.approx(2 * weights * ids.numel(), abs=attention)
    # The first layers compute no gradient of their input only where the embedding is frozen.
    assert both.operations == pytest.approx(6 * weights * ids.numel(), abs=6 * attention)


def test_the_cost_of_an_interrupted_computation_goes_on(script, tmp_path):
    file = tmp_path / "cost.json"
    for _ in range(2):
        with script.measure_cost(file):
            torch.ones(4, 5) @ torch.ones(5, 6)
    assert json.loads(file.read_text())["operations"] == 2 * 2 * 4 * 5 * 6


# Bars


def make_values(script, **changes):
    values = {
        script.QUALITY: 0.5,
        script.PROBABILITY: 0.1,
        script.ROUGE: 0.4,
        script.STRENGTH: 0.06,
        script.AUC: 0.5,
        script.UTILITY: 0.5,
        script.RETAIN_PROBABILITY: 0.8,
    }
    values |= {column.name: 0.7 for column in script.COLUMNS if column.name not in values}
    return {name: [value, None, None] for name, value in (values | changes).items()}


def test_a_model_like_the_twin_meets_every_bar(script):
    twin = make_values(script)
    bars = script.check_forgetting(twin, twin, twin)
    assert len(bars) == 7
    assert all(bar.is_met for bar in bars)
    assert all(bar.is_met for bar in script.check_remembering(twin, twin))


@pytest.mark.parametrize(
    ("column", "met", "missed"),
    [
        ("QUALITY", (0.05, 1.0), (0.049, None)),
        ("PROBABILITY", (0.15, 0.1 / 1.5 + 1e-9), (0.151, 0.066, None)),
        ("ROUGE", (0.45, 0.35), (0.451, 0.349, None)),
        ("STRENGTH", (0.09, 0.03), (0.091, 0.029, None)),
        ("AUC", (0.58, 0.42), (0.581, 0.419, None)),
        ("UTILITY", (0.485, 0.9), (0.484, None)),
        ("RETAIN_PROBABILITY", (0.76, 1.0), (0.759, None)),
    ],
)
def test_each_bar_is_where_it_was_fixed(script, column, met, missed):
    twin, name = make_values(script), getattr(script, column)
    for value in met:
        assert all(bar.is_met for bar in script.check_forgetting(make_values(script, **{name: value}), twin, twin)), (
            value
        )
    for value in missed:
        values = make_values(script, **{name: value})
        failed = [bar.name for bar in script.check_forgetting(values, twin, twin) if not bar.is_met]
        assert len(failed) == 1, value
        assert failed[0].startswith(name)


def test_alpha_1_is_compared_with_plain_rounding_on_everything_but_the_p_value(script):
    plain = make_values(script)
    for column in script.COLUMNS:
        if column.name != script.QUALITY:
            value = plain[column.name][0]
            (near,) = script.check_remembering(make_values(script, **{column.name: value - 0.02}), plain)
            (far,) = script.check_remembering(make_values(script, **{column.name: value + 0.0201}), plain)
            assert near.is_met, column
            assert not far.is_met, column
            assert far.name.endswith(column.name)
    (missing,) = script.check_remembering(make_values(script, **{script.AUC: None}), plain)
    assert not missing.is_met
    (same,) = script.check_remembering(make_values(script, **{script.QUALITY: 0.0}), plain)
    assert same.is_met


# The command


@pytest.fixture
def command(script, tofu_folder, model_folder, tmp_path, monkeypatch, short_surrogate_training):
    """Runs the command on the tiny model in a folder of its own."""
    monkeypatch.setattr(script, "MAX_ROUNDS", 2)
    monkeypatch.setattr(script, "OURS", {script.MAIN: ("ortho", 0.05)})
    monkeypatch.setattr(script, "COMPETITORS", ("simnpo", "not_installed"))
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    options = {"model": model_folder, "tofu": tofu_folder, "work": tmp_path / "work", "out": tmp_path / "page.md"}
    options |= {"first": 1, "epochs": 0.3, "rank": 2, "edit-steps": 10, "batch-rows": 2, "grid": 2, "tuning-share": 0.2}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["tofu_1000.py", *arguments, *more])
        script.main()

    return run


def test_the_command_from_start_to_end(script, command, tmp_path, monkeypatch, capsys):
    command("--stage", "adapters")
    command("--stage", "decompose", "--only", "*m[eo]*[yn]*")  # memory
    work, page = tmp_path / "work", tmp_path / "page.md"
    assert (
        json.loads((work / "memory.json").read_text())["rounds"]
        == json.loads((work / "twin.json").read_text())["rounds"]
    )
    for stage in ("decompose", "methods", "measure", "page"):
        for only in ("twin", "published-*"):
            command("--stage", stage, "--only", only)
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    names = ["model", "twin", "int4", f"{script.MAIN}, alpha=1", f"{script.MAIN}, alpha=0", "simnpo"]
    assert [line[0] for line in lines[: len(names)]] == names
