"""TOFU-1000: the whole command on a tiny model, its bars, its counter of operations and its rows."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from lm_ortho.baselines import Method
from lm_ortho.data import read_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.tofu_data import FULL_ROWS
from lm_ortho.objective.support_gradient import SupportGradient, has_sampled_product
from tests.support import checkpoint, harness, tiny, tofu
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture(scope="module")
def script():
    """The command; its parts are modules beside it, which Python finds when it runs the file."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(REPOSITORY / "experiments"))
        yield load_script(REPOSITORY / "experiments" / "tofu_1000.py")


def make_part_fixture(name):
    """Returns a fixture that is the module ``name`` of the command."""

    @pytest.fixture(scope="module", name=name)
    def part(script):
        return importlib.import_module(f"tofu1000.{name}")

    return part


rows, bars, cost, adapters, entries, making, measuring = map(
    make_part_fixture, ("rows", "bars", "cost", "adapters", "entries", "making", "measuring")
)


@pytest.fixture(scope="module")
def tofu_folder(tmp_path_factory):
    return tofu.write_authors(tmp_path_factory.mktemp("data") / "tofu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, rows):
    """A model of one block, and a tokenizer of the words of the data with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    authors = [tofu.author_row(number) for number in range(FULL_ROWS)]
    texts = [text for row in authors for text in row.values()] + [rows.SYSTEM_INSTRUCTION, "It was Capital of So . ? :"]
    tokenizer = harness.train_tokenizer(texts)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 96}
    tiny.llama(vocab_size=len(tokenizer), initializer_range=0.05, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Rows


def test_the_rows_are_those_of_the_protocol(rows, tofu_folder):
    table = rows.read_tofu(tofu_folder)
    assert list(table.planted_rows) == [*range(900), *range(3900, 4000)]
    assert len(table.select(rows.RETAIN, without=rows.LEFT_OUT)) == 700
    forget = table.select(rows.FORGET)
    assert [row.answer for row in forget] == [tofu.author_row(number)["answer"] for number in range(3900, 4000)]
    sets = [table.never_taught_rows, table.unknown_rows, forget, table.select(rows.RETAIN)]
    subjects = [{row.subject for row in part} for part in sets]
    assert [len(names) for names in subjects] == [5, 5, 5, 45]
    assert len(set.union(*subjects)) == 60, "no author is in two sets"
    assert all(row.mentions_subject and row.group == row.subject for part in sets for row in part)
    assert len(rows.read_tofu(tofu_folder, first=2).planted_rows) == 100


def test_the_tuning_reads_no_row_that_is_forgotten_or_measured(rows):
    tuned = {*rows.TUNING_FORGET, *rows.TUNING_HELD_OUT}
    assert not tuned & {*rows.MEASURED_ROWS, *range(3900, 4000)}
    assert set(rows.LEFT_OUT) <= set(rows.MEASURED_ROWS)


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_chat_has_the_system_prompt_and_ends_with_the_answer(rows, tofu_folder, end):
    tokenizer = checkpoint.tokenizer()
    tokenizer.chat_template = TEMPLATE + f"{{{{ {end!r} }}}}"
    row = rows.read_tofu(tofu_folder, 1).planted_rows[0]
    (chat,) = rows.render_chat([row], tokenizer)
    text = f"<system>{rows.SYSTEM_INSTRUCTION}<user>{row.question}<bot>{end}"
    assert (chat.context, chat.target) == (text, row.answer)
    assert chat.subject == row.subject


def test_the_measured_files_have_the_rows_of_full(rows, tofu_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tofu_folder, data)
    lines = (data / "retain_perturbed.jsonl").read_text().splitlines(keepends=True)
    (data / "retain_perturbed.jsonl").write_text("".join(lines[1:]))
    rows.write_measured_files(tofu_folder, tmp_path / "few", questions=5)
    measured = read_rows(tmp_path / "few" / "retain_perturbed.jsonl")
    assert len(measured) == 100
    assert len({row.group for row in measured}) == 20
    assert len(read_rows(tmp_path / "few" / "forget10_perturbed.jsonl")) == 100
    with pytest.raises(UserError, match="retain_perturbed and full have other rows"):
        rows.write_measured_files(data, tmp_path / "measured")
    (data / "full.jsonl").rename(data / "full.json")  # its name on the hub
    assert len(read_rows(data / "full.json")) == len(rows.read_table(data, "full"))
    (data / "full.json").rename(data / "full.jsonl")
    (data / "full.jsonl").write_text("".join((data / "full.jsonl").read_text().splitlines(keepends=True)[:7]))
    with pytest.raises(UserError, match="full has 7 rows, TOFU has 4000"):
        rows.read_tofu(data)


# Operations


def test_operations_are_two_for_each_weight_and_token_and_six_with_the_backward_pass(cost):
    model = tiny.llama(tie_word_embeddings=False).requires_grad_(True)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    ids = tiny.tokens(3, 8)
    with cost.OperationCounter() as forward, torch.no_grad():
        model(input_ids=ids)
    with cost.OperationCounter() as both:
        model(input_ids=ids).logits.sum().backward()
    attention = 2 * 2 * 2 * 8 * 64 * ids.numel()  # two products of 8 keys with a width of 64 in each of two blocks
    assert forward.operations == pytest.approx(2 * weights * ids.numel(), abs=attention)
    assert both.operations == pytest.approx(6 * weights * ids.numel(), abs=4 * attention)


def test_fused_attention_and_sampled_products_are_counted(cost):
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    with cost.OperationCounter() as attention:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert attention.operations == (2 + 5) * 2 * query.numel() * 16  # two products forward and five backward
    support = SupportGradient(torch.nn.Linear(64, 64), torch.arange(0, 4096, 256))
    if has_sampled_product():
        with cost.OperationCounter() as sampled:
            support.compute(torch.randn(100, 64), torch.randn(100, 64))
        assert sampled.operations == 2 * 16 * 100


def test_the_cost_of_an_interrupted_computation_goes_on(cost, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "SAVE_SECONDS", -1)
    file, reports = tmp_path / "cost.json", []

    def compute(is_interrupted):
        with cost.measure_cost(file) as wrap:
            torch.ones(4, 5) @ torch.ones(5, 6)
            wrap(lambda *report: reports.append(report))("stage", 1, 2, "half")
            if is_interrupted:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(is_interrupted=True)
    compute(is_interrupted=False)
    assert reports == [("stage", 1, 2, "half")] * 2
    assert json.loads(file.read_text())["operations"] == 2 * 2 * 4 * 5 * 6


# Bars


def make_values(bars, **changes):
    values = {
        bars.QUALITY: 0.5,
        bars.PROBABILITY: 0.1,
        bars.ROUGE: 0.4,
        bars.STRENGTH: 0.06,
        bars.AUC: 0.5,
        bars.UTILITY: 0.5,
        bars.RETAIN_PROBABILITY: 0.8,
    }
    values |= {column.name: 0.7 for column in bars.COLUMNS if column.name not in values}
    return {name: [value, None, None] for name, value in (values | changes).items()}


def test_a_model_like_the_twin_meets_every_bar(bars):
    twin = make_values(bars)
    checks = bars.check_forgetting(twin, twin, twin)
    assert len(checks) == 7
    assert all(bar.is_met for bar in checks)
    assert all(bar.is_met for bar in bars.check_remembering(twin, twin))


@pytest.mark.parametrize(
    ("column", "met", "missed"),
    [
        ("QUALITY", (0.05, 1.0), (0.049, None)),
        ("PROBABILITY", (0.15, 0.0667), (0.151, 0.066, None)),
        ("ROUGE", (0.45, 0.35), (0.451, 0.349, None)),
        ("STRENGTH", (0.09, 0.03), (0.091, 0.029, None)),
        ("AUC", (0.58, 0.42), (0.581, 0.419, None)),
        ("UTILITY", (0.485, 0.9), (0.484, None)),
        ("RETAIN_PROBABILITY", (0.76, 1.0), (0.759, None)),
    ],
)
def test_each_bar_is_where_it_was_fixed(bars, column, met, missed):
    twin, name = make_values(bars), getattr(bars, column)
    for value in met:
        assert all(bar.is_met for bar in bars.check_forgetting(make_values(bars, **{name: value}), twin, twin)), value
    for value in missed:
        checks = bars.check_forgetting(make_values(bars, **{name: value}), twin, twin)
        failed = [bar.name for bar in checks if not bar.is_met]
        assert len(failed) == 1, value
        assert failed[0].startswith(name)


def test_alpha_1_is_compared_with_plain_rounding_on_everything_but_the_p_value(bars):
    plain = make_values(bars)
    for column in bars.COLUMNS:
        if column.name != bars.QUALITY:
            value = plain[column.name][0]
            (near,) = bars.check_remembering(make_values(bars, **{column.name: value - 0.02}), plain)
            (far,) = bars.check_remembering(make_values(bars, **{column.name: value + 0.0201}), plain)
            assert near.is_met, column
            assert not far.is_met, column
            assert far.name.endswith(column.name)
    (missing,) = bars.check_remembering(make_values(bars, **{bars.AUC: None}), plain)
    assert not missing.is_met
    (same,) = bars.check_remembering(make_values(bars, **{bars.QUALITY: 0.0}), plain)
    assert same.is_met


# The command


def test_the_memory_is_trained_until_it_knows_the_rows_and_the_twin_as_long(adapters, tmp_path):
    assert not adapters.is_last_round(tmp_path, "memory", 1, 0.59)
    assert adapters.is_last_round(tmp_path, "memory", 1, 0.6)
    assert adapters.is_last_round(tmp_path, "memory", adapters.MAX_ROUNDS, 0.1)
    with pytest.raises(UserError, match="train memory first"):
        adapters.is_last_round(tmp_path, "twin", 1, 0.9)
    (tmp_path / "memory.json").write_text('{"rounds": 2}')
    assert [adapters.is_last_round(tmp_path, "twin", number, 0.9) for number in (1, 2)] == [False, True]


def test_a_folder_belongs_to_the_arguments_of_its_training(script, tmp_path):
    def check(*options):
        paths = ("--model", "m", "--tofu", "t", "--work", str(tmp_path))
        script.check_work(script.make_parser().parse_args([*paths, *options]))

    check()
    check(*"--epochs 6 --lr 0.001 --edit-steps 20".split())
    for option, text in {"--epochs": "7", "--first": "3"}.items():
        with pytest.raises(UserError, match=f"made with {option[2:]}=.*; use another folder"):
            check(option, text)


def test_states_and_costs_of_other_choices_are_others(making):
    hash_choices = making.hash_choices
    assert hash_choices([{"steps": 10}, "None"]) == hash_choices([{"steps": 10}, "None"])
    assert len({hash_choices([{"steps": steps}, budget]) for steps in (10, 11) for budget in ("None", "3")}) == 4


def test_all_models_are_measured_on_the_same_rows(script, measuring, tofu_folder, tmp_path):
    paths = ("--model", "m", "--tofu", str(tofu_folder), "--work", str(tmp_path))
    measuring.write_task_files(script.make_parser().parse_args([*paths, "--retain-questions", "2"]))
    assert len(read_rows(tmp_path / "measured" / "retain_perturbed.jsonl")) == 40
    with pytest.raises(UserError, match=r"retain_questions=20: this folder has measurements with 2; use the same"):
        measuring.write_task_files(script.make_parser().parse_args(paths))


def test_the_list_has_every_method_under_both_protocols(entries):
    listed = entries.list_entries({})
    labels = [label for entry in listed for label in entry.labels]
    assert len(set(labels)) == len(labels) == 2 + 2 * (1 + 2 * 4 + 9)
    assert {entry.method for entry in listed if entry.method in entries.METHODS} >= {"npo", "ortho", "ortho_merged"}
    assert any(entry.name == f"published-{entries.MAIN}" and entry.settings == {"density": 0.01} for entry in listed)


@pytest.fixture
def command(script, adapters, entries, tofu_folder, model_folder, tmp_path, monkeypatch, short_surrogate_training):
    """Runs the command on the tiny model in a folder of its own."""
    monkeypatch.setattr(adapters, "MAX_ROUNDS", 2)
    monkeypatch.setattr(entries, "OURS", {entries.MAIN: ("ortho", 0.05)})
    monkeypatch.setattr(entries, "COMPETITORS", ("simnpo", "not_installed"))
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    options = {"model": model_folder, "tofu": tofu_folder, "work": tmp_path / "work", "out": tmp_path / "page.md"}
    options |= {
        "first": 1,
        "epochs": 0.3,
        "rank": 2,
        "edit-steps": 10,
        "edit-rows": 40,
        "batch-rows": 15,
        "grid": 2,
        "tuning-share": 0.2,
    }
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["tofu_1000.py", *arguments, *more])
        script.main()

    return run


def read_table(page):
    """Returns the cells of the tables of a page by the name of the model; the last table with a model counts."""
    lines = [line[2:-2].split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines}


def test_the_command_from_start_to_end(
    script,
    rows,
    bars,
    adapters,
    entries,
    making,
    measuring,
    command,
    tofu_folder,
    model_folder,
    tmp_path,
    monkeypatch,
    capsys,
):
    work, page = tmp_path / "work", tmp_path / "page.md"
    # 1. Adapters; the second round starts where the first one ended, and the twin has as many as the memory.
    command("--stage", "adapters")
    records = {name: json.loads((work / f"{name}.json").read_text()) for name in entries.ADAPTERS}
    assert records["memory"]["rounds"] == records["twin"]["rounds"] == 2
    weights = [load_file(path / "adapter_model.safetensors") for path in (work / "twin-round-1", work / "twin")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # 2. Without its own decomposition no method has a budget, and without the twin nothing is compared.
    with pytest.raises(SystemExit, match=r"published-ours-base-0.01 first"):
        command("--stage", "methods", "--only", "published-*")
    command("--stage", "decompose", "--only", "published-*")
    with pytest.raises(SystemExit, match="measure twin first"):
        command("--stage", "measure", "--only", "published-*")
    # The lattices around the support and without one: a script of its own.
    options = {"model": model_folder, "tofu": tofu_folder, "work": work, "first": 1}
    monkeypatch.setattr(
        sys, "argv", ["x", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    )
    load_script(REPOSITORY / "experiments/lattice_order.py").main()
    assert re.search(r"\| largest input first, around the support: alpha=1 +\| 0\.", capsys.readouterr().out)
    # 3. The rest.
    capsys.readouterr()
    for stage, only in itertools.product(("decompose", "methods", "measure", "page"), ("twin", "published-*")):
        command("--stage", stage, "--only", only)
    assert not list((work / "costs").glob("unfinished*")), "the cost of an entry that is made is in its record"
    assert "method=not_installed is not installed and is left out" in capsys.readouterr().err
    table = read_table(page)
    ours, plain = (f"{entries.MAIN}, alpha={alpha}" for alpha in (0, 1))
    assert list(table) == ["model", "twin", "int4", plain, ours, "simnpo"]
    operations = {name: float(table[name]["operations"]) for name in (ours, "simnpo")}
    assert operations["simnpo"] == pytest.approx(operations[ours], rel=0.1), "the same operations"
    trials = json.loads((work / "tuning" / "simnpo.json").read_text())
    assert [trial["settings"]["lr"] for trial in trials] == [3e-5, 1e-4]
    best = min(trials, key=lambda trial: trial["total"])["settings"]
    assert json.loads((work / "records" / "published-simnpo.json").read_text())["settings"] == best
    settings = json.loads((work / "records" / f"published-{entries.MAIN}.json").read_text())["settings"]
    assert settings == {"density": 0.05, "steps": 10, "batch_rows": 40}
    assert table[ours]["bars"].endswith(" of 7")
    assert table[plain]["bars"] in ("0 of 1", "1 of 1")
    at_one, int4, probability = (float(table[name][bars.PROBABILITY].split(" ")[0]) for name in (plain, "int4", "twin"))
    assert at_one > int4 - bars.MAX_CHANGE, "the memory is there, and may be better than in plain INT4"
    assert probability == pytest.approx(records["twin"]["probability"], rel=0.01), "trained as it is scored"
    assert 0 < float(table["simnpo"][bars.QUALITY]) <= 1
    assert "left-out-simnpo" in page.read_text().splitlines()[-1]
    # 4. Models that are measured and have no alpha are deleted, and everything is stored.
    assert [path.name for path in (work / "models").iterdir()] == [f"published-{entries.MAIN}"]
    monkeypatch.setattr(Method, "make", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(measuring.lm_eval, "simple_evaluate", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr(adapters, "train_adapter", lambda *_, **__: pytest.fail("trained again"))
    text = page.read_text()
    command("--only", "published-*")
    assert page.read_text().splitlines()[3:] == text.splitlines()[3:]
    # 5. By the left-out protocol, no method reads the rows that are measured.
    arguments = script.make_parser().parse_args(sys.argv[1:])
    left_out = {row.answer for row in rows.read_tofu(arguments.tofu, 1).select(rows.LEFT_OUT)}
    answers = {row.answer for row in making.load_material(arguments, "left-out").retain}
    assert not left_out & answers
    assert left_out <= {row.answer for row in making.load_material(arguments, "published").retain}
