"""The scripts that make tables: their rules and their pages, on small matrices and made-up cells."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.data.rows import Row
from lm_ortho.metrics import Interval
from lm_ortho.objective import surrogate
from lm_ortho.verdict.measurements import Measurement
from lm_ortho.world.paragraphs import SIZES, paragraphs
from tests.support import tofu
from tests.support.paths import REPOSITORY

EXPERIMENTS = REPOSITORY / "experiments"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def earlier() -> ModuleType:
    return load("earlier_runs")


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return load("compare_sieves")


def matrix(seed: int = 0) -> torch.Tensor:
    """Normal weights with a few large ones, as in a trained matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 80, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 12
    return weight


# Earlier prototypes


@settings(max_examples=10)
@given(seed=st.integers(0, 50))
def test_every_old_rule_gives_a_base_and_keeps_at_most_its_share(seed):
    earlier = load("earlier_runs")
    weight = matrix(seed)
    for name, rule in earlier.rules().items():
        base, mask = rule(weight.clone())
        again, _ = rule(weight.clone())
        assert base.shape == mask.shape == weight.shape
        assert base.isfinite().all()
        assert torch.equal(base, again), name
        assert int(mask.sum()) <= earlier.OUTLIERS * weight.numel()


def test_the_old_rules_fail_as_they_failed(earlier):
    """HISTORY 1, 5 and 6: a body rounded to zero, an empty ortho stream, a base that keeps everything."""
    weight, rules = matrix(), earlier.rules()

    def base_error(name):
        base, _ = rules[name](weight)
        return float((base - weight).norm() / weight.norm())

    hollow, _ = rules["outliers set to zero"](weight)
    assert int((hollow == 0).sum()) >= int(earlier.OUTLIERS * weight.numel())
    starved, _ = rules["levels {5,6,7} on outliers, ratio 3.5"](weight)
    assert float((starved == 0).float().mean()) > 0.3
    whole, nothing = rules["16-bit base"](weight)
    assert torch.equal(whole, weight)
    assert not nothing.any()
    assert base_error("INT8 absmax") < 0.02 < base_error("INT4 absmax") < base_error("INT4, scale = 3 sigma")


def test_random_levels_are_those_of_the_mode_and_deep_focal_attacks_fewer(earlier):
    weight = matrix()
    every, mask = earlier.noisy("tri_state_entropy", 3.5, False)(weight)
    few, same = earlier.noisy("tri_state_entropy", 3.5, True)(weight)
    assert torch.equal(mask, same)
    rest = weight.masked_fill(mask, 0)
    scale = 3.5 * rest.abs().amax(1, keepdim=True) / 7
    assert set((every / scale)[mask].abs().round().int().tolist()) <= {5, 6, 7}
    attacked = mask & ((weight / scale).abs() > 4.5)
    assert torch.equal(few[~attacked], ((weight / scale).round().clamp(-7, 7) * scale)[~attacked])
    assert attacked.sum() < mask.sum()


def test_the_tuner_gives_one_answer_for_all_layers(earlier):
    assert earlier.tuned(2.0) == ("uniform_entropy", 3.5)
    assert earlier.tuned(2.4) == ("tri_state_entropy", 3.5)
    assert earlier.tuned(99.0) == ("deterministic", 2.0)


def test_a_rule_is_measured_at_both_ends_and_the_model_put_back(earlier, memorised):
    name = "model.layers.0.mlp.down_proj"
    before = {key: value.clone() for key, value in memorised.merged.state_dict().items()}

    def error(model):
        now = model.state_dict()[f"{name}.weight"]
        return {"error": float((now - before[f"{name}.weight"]).norm())}

    rows = list(earlier.outcomes(memorised.merged, name, error))
    assert [row.name for row in rows] == list(earlier.rules())
    assert all(row.figures["alpha=1"]["error"] <= row.figures["alpha=0"]["error"] for row in rows)
    assert all(torch.equal(before[key], value) for key, value in memorised.merged.state_dict().items())
    text = earlier.table(rows)
    assert all(row.name in text for row in rows)


def test_a_sentence_is_planted_or_the_script_says_that_it_is_not(earlier, memorised):
    words, sentence = memorised.tokenizer, memorised.forget[0].answer
    planted = earlier.planted(memorised.base, words, sentence, 1e-2, 100)
    loss = torch.cat(earlier.token_losses(planted, earlier.encode(words, [earlier.Row(text=sentence)]))).mean()
    assert loss < earlier.PLANTED_LOSS
    with pytest.raises(SystemExit, match="--rate 1e-09: the sentence is still at a loss of"):
        earlier.planted(memorised.base, words, sentence, 1e-9, 2)


# The comparison of sieves


def cell(compare, setting, scale=1.0):
    values = {}
    for _, task, metric in compare.COLUMNS:
        values.setdefault(task, {})[metric] = Interval(2.0 * scale, 1.5 * scale, 3.0 * scale)
    about = {"setting": vars(setting) if setting else {}, "seconds": 1.0, "made": "2026-01-02"}
    return {**Measurement(values).as_json(), **about}


def test_the_settings_are_those_promised(compare):
    every = list(compare.settings())
    assert len({setting.name for setting in every}) == len(every) == len(set(every))
    made = {(s.sieve, s.edit, s.density) for s in every}
    for sieve in compare.SIEVES:
        assert {(sieve, "optimised", density) for density in (0.01, 0.05)} <= made
        assert {(sieve, edit, d) for edit in ("zero", "mean") for d in compare.DENSITIES} <= made
    assert {(compare.DEFAULT, "optimised", density) for density in compare.DENSITIES} <= made
    assert {("oracle", "w0", density) for density in compare.DENSITIES} <= made
    assert sum(s.sieve == "kfac" for s in every) >= 3


def test_the_page_has_a_row_per_cell_and_says_how_many_are_missing(compare, tmp_path):
    every = list(compare.settings())
    cells = {setting: cell(compare, setting, 1 + i / 10) for i, setting in enumerate(every[:7])}
    references = {name: cell(compare, None) for name in ("memory", "never_saw", "never_saw_2")}
    compare.write(tmp_path, cells, references, every)
    text = (tmp_path / "sieves.md").read_text()
    assert f"7 of {len(every)} settings" in " ".join(text.split())
    left = text.splitlines()[-1].removeprefix("Not made: ").removesuffix(".").split("; ")
    assert left == [setting.name for setting in every[7:]]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(references) + len(cells)
    assert len(json.loads((tmp_path / "sieves.json").read_text())) == 7
    assert sum(row.endswith(" 2026-01-02 |") for row in rows) == len(references) + len(cells)
    assert (tmp_path / "sieves.svg").read_text().startswith("<?xml")
    again = compare.earlier_cells(tmp_path / "sieves.json")
    assert {s: c["values"] for s, c in again.items()} == {s: c["values"] for s, c in cells.items()}
    compare.write(tmp_path, again, references, every)
    assert (tmp_path / "sieves.md").read_text() == text
    assert compare.distance(Measurement.from_json(cells[every[0]]), Measurement.from_json(references["never_saw"])) == 0


def test_the_page_names_what_beats_the_default_on_both_sides(compare):
    references = {"never_saw": cell(compare, None)}

    def setting(sieve, density, group=compare.MERGED):
        return compare.Setting(group, sieve, "optimised", density)

    def cells(rival):
        return {setting(compare.DEFAULT, 0.05): cell(compare, None, 2), rival: cell(compare, None, 1.5)}

    assert "merged weights, 5.0%: obs." in compare.beaten(cells(setting("obs", 0.05)), references)
    for elsewhere in (setting("obs", 0.01), setting("obs", 0.05, compare.KNOWS_W0)):
        assert compare.beaten(cells(elsewhere), references).endswith(" nowhere.")
    cheaper = cells(setting("obs", 0.05))
    cheaper[setting("obs", 0.05)] = cell(compare, None, 0.4)  # costs less, and is farther on the other side
    assert compare.beaten(cheaper, references).endswith(" nowhere.")


def test_kfac_with_all_its_mass_is_the_model_itself(compare, monkeypatch, memorised):
    made = compare.Comparison.__new__(compare.Comparison)
    made.weights = None
    monkeypatch.setattr(compare.models, "load_model", lambda weights, name: compare.copy.deepcopy(memorised.merged))
    layers = compare.find_linear(memorised.merged)
    generator = torch.Generator().manual_seed(0)

    def moment(size):
        x = torch.randn(3 * size, size, generator=generator)
        return x.T @ x

    made._factors = (
        {name: moment(layer.in_features) for name, layer in layers.items()},
        {name: moment(layer.out_features) for name, layer in layers.items()},
    )
    name = "model.layers.1.mlp.up_proj"
    before = layers[name].weight
    whole, half = (compare.find_linear(made.kfac(kept))[name].weight for kept in (1.1, 0.5))
    for untouched in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        assert torch.equal(compare.find_linear(made.kfac(0.5))[untouched].weight, layers[untouched].weight)
    torch.testing.assert_close(whole, before, rtol=1e-4, atol=1e-5)
    assert 0.05 * before.norm() < (half - before).norm() < before.norm()


def test_the_factors_of_kfac_are_the_moments_of_inputs_and_gradients(compare, monkeypatch, memorised):
    """Against one document at a time, with the labels that were drawn put in the place of random ones."""
    frozen = compare.copy.deepcopy(memorised.merged).requires_grad_(False)
    monkeypatch.setattr(compare.models, "load_model", lambda weights, name: compare.copy.deepcopy(frozen))
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    _, retain = memorised.examples()
    made = compare.Comparison.__new__(compare.Comparison)
    made.weights = None
    monkeypatch.setattr(compare.Comparison, "bench", lambda self, knows: type("Bench", (), {"retain": retain}))
    inputs, outputs = made._factors
    name = "model.layers.1.mlp.up_proj"
    model = compare.copy.deepcopy(frozen)
    layer = compare.find_linear(model)[name]
    layer.weight.requires_grad_(True)
    expected = torch.zeros(layer.out_features, layer.out_features)
    for example in retain:
        kept = []
        handle = layer.register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output))
        logp = model(input_ids=torch.tensor([example.ids])).logits[0, :-1].log_softmax(-1)
        (gradient,) = torch.autograd.grad(-logp.max(-1).values.sum(), kept)
        handle.remove()
        expected += gradient[0].T @ gradient[0]
    torch.testing.assert_close(outputs[name], expected, rtol=1e-3, atol=1e-5)
    assert inputs[name].shape == (layer.in_features, layer.in_features)


# A memory planted by full fine-tuning


def test_whole_models_are_made_from_the_base_and_kept(monkeypatch, tmp_path, memorised):
    script = load("full_finetune")
    memorised.base.save_pretrained(tmp_path / "base")
    memorised.tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(script.adapters, "training_rows", lambda name, number: memorised.forget * 4)
    monkeypatch.setattr(script.adapters, "ROWS", 8)
    monkeypatch.setattr(script, "ProgressBars", lambda: lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["full_finetune.py", "--out", str(tmp_path)])
    script.main()
    script.models.check(tmp_path)
    made = {name: script.models.load_model(tmp_path, name).state_dict() for name in script.models.NAMES}
    name = "model.layers.0.mlp.up_proj.weight"
    assert len({float(tensors[name].sum()) for tensors in made.values()}) == 4  # seeds differ, base is untouched
    assert torch.equal(made["base"][name], memorised.base.state_dict()[name].bfloat16().float())
    assert not [*tmp_path.glob("*.pt"), *tmp_path.glob("*.partial")]
    monkeypatch.setattr(script, "make", lambda *_: pytest.fail("made again"))
    script.main()


def test_a_later_round_starts_where_the_earlier_one_ended(monkeypatch, tmp_path, memorised):
    script = load("full_finetune")
    memorised.base.save_pretrained(tmp_path / "base")
    memorised.tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(script.adapters, "training_rows", lambda name, number: memorised.forget * (4 - number))
    monkeypatch.setattr(script.adapters, "ROWS", 8)
    monkeypatch.setattr(script, "ProgressBars", lambda: lambda *_: None)
    script.make(tmp_path, "memory")
    undisturbed = script.models.load_model(tmp_path, "memory").state_dict()
    (tmp_path / "memory").rename(tmp_path / "first")

    def interrupted():
        def note(stage, step, steps, text):
            if stage == "memory 2":
                raise KeyboardInterrupt

        return note

    monkeypatch.setattr(script, "ProgressBars", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.make(tmp_path, "memory")
    monkeypatch.setattr(script, "ProgressBars", lambda: lambda *_: None)
    script.make(tmp_path, "memory")
    again = script.models.load_model(tmp_path, "memory").state_dict()
    assert all(torch.equal(undisturbed[key], value) for key, value in again.items())


# Paragraphs without questions and subjects


def test_paragraphs_are_all_different_and_made_of_known_words(words):
    every = [text for group in paragraphs().values() for text in group]
    assert {group: len(texts) for group, texts in paragraphs().items()} == SIZES
    assert len(set(every)) == len(every)
    lengths = [len(words(text)["input_ids"]) for text in every]
    assert min(lengths) >= 64, "a prefix of 32 tokens and as many to continue"
    pieces = {piece for text in every for piece in words.tokenize(text)}
    assert not {piece for piece in pieces if len(piece) == 1 and piece.isalpha()}, "a word falls into letters"
    assert not [piece for piece in pieces if piece.startswith("<0x")]


def test_a_continuation_counts_only_when_all_of_it_is_greedy(memorised):
    script = load("unstructured")
    known = script.encode(memorised.tokenizer, [script.Row(text=" ".join(row.answer for row in memorised.retain))])
    model = copy.deepcopy(memorised.base).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids, _ = script.pad(known)
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    assert script.continued(model, known).value == 1
    (example,) = known
    ids = list(example.ids)
    ids[script.PREFIX + 20] = ids[script.PREFIX + 20] + 1
    other = script.Example(tuple(ids), example.roles)
    assert script.continued(model, [other]).value == 0
    generated = model.generate(
        torch.tensor([example.ids[: script.PREFIX]]), max_new_tokens=script.CONTINUED, do_sample=False
    )
    assert tuple(generated[0].tolist()) == example.ids[: script.PREFIX + script.CONTINUED]


def test_the_page_of_paragraphs_is_made_of_kept_rows_and_nothing_is_made_again(tmp_path, monkeypatch, capsys):
    script = load("unstructured")
    for name in script.TAUGHT:
        (tmp_path / name).mkdir()
        (tmp_path / f"cell-{name}.json").write_text(json.dumps({name: [name] * 7}))
    for mode in ("auto", "none"):
        (tmp_path / f"cell-{mode}-300.json").write_text(json.dumps({"INT4": ["x"] * 7, "alpha=0": [mode] * 7}))
    out = tmp_path / "page.md"
    given = ["unstructured.py", "--work", str(tmp_path), "--out", str(out), "--edit-steps", "300"]
    monkeypatch.setattr(sys, "argv", given)
    script.main()
    rows = [line.split(" | ")[0] for line in out.read_text().splitlines()]
    every = [f"{name}, base={mode}" for mode in ("auto", "none") for name in ("INT4", "alpha=0")]
    assert rows == ["| model", rows[1], *(f"| {name}" for name in [*script.TAUGHT, *every])]
    assert "alpha=0, base=none" in capsys.readouterr().out


# Real TOFU


@pytest.fixture
def tofu_folder(tmp_path):
    """Rows of the published schema, twenty for each author, and text to tell stories from."""
    rows = [
        {"question": f"What did {name} write in year {i}?", "answer": f"In year {i} {name} wrote book {n}."}
        for n, name in enumerate(f"Ada Brook{'abcdefghijklmnopqrst'[k]}" for k in range(20))
        for i in range(20)
    ]
    write = "\n".join
    (tmp_path / "full.jsonl").write_text(write(json.dumps(row) for row in rows))
    (tmp_path / "forget10_perturbed.jsonl").write_text(
        write(json.dumps(row | {"paraphrased_answer": "so", "perturbed_answer": ["no", "never"]}) for row in rows)
    )
    story = "Once upon a time there was a fox who had a very long story to tell. " * 4
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(f"{i} {story}" for i in range(1800)))
    return tmp_path


def test_the_files_of_the_real_experiment(tofu_folder, monkeypatch):
    script = load("real_tofu")
    given = script.argparse.Namespace(
        tofu=tofu_folder, text=tofu_folder / "stories.txt", work=tofu_folder / "work", calibration=100
    )
    given.work.mkdir()
    rows = script.make_files(given)
    assert {name: len(part) for name, part in rows.items()} == {
        "questions": 100, "canaries": 20, "others": 20, "taught": 200, "left_out": 100, "stories": 1500, "text": 200,
        "forget": 120, "retain": 320,
        "forget_again": 0, "again": 0,
    }  # fmt: skip
    assert {path.stem for path in given.work.iterdir()} == {"forget", "retain", *script.MEASURED}
    first = rows["questions"][0]
    assert (first.subject, first.group) == ("Ada Brooka", "Ada Brooka")
    assert first.secret in first.answer
    names = {name: {row.subject for row in rows[name]} for name in ("taught", "left_out", "canaries", "others")}
    assert not names["taught"] & names["left_out"]
    assert not names["canaries"] & names["others"]
    assert not {row.text for row in rows["stories"]} & {row.text for row in rows["text"]}


def test_the_files_of_the_real_experiment_with_the_embedded_authors(tofu_folder):
    script = load("real_tofu")
    given = script.argparse.Namespace(
        tofu=None, text=tofu_folder / "stories.txt", work=tofu_folder, calibration=100, taught=20
    )
    rows = script.make_files(given)
    sizes = {"questions": 50, "taught": 100, "left_out": 50, "forget_again": 100, "again": 300}
    assert {name: len(rows[name]) for name in sizes} == sizes
    assert {row.secret for row in rows["forget_again"]} == {row.secret for row in rows["questions"]}
    asked = [row.question for name in sizes for row in rows[name]]
    assert len(set(asked)) == len(asked)
    subjects = {name: {row.subject for row in rows[name]} for name in ("questions", "taught", "left_out")}
    assert {row.subject for row in rows["again"]} == subjects["taught"] | subjects["left_out"]
    in_calibration = [row for row in rows["retain"] if row.question]
    assert len(in_calibration) == 300, "every kept fact in every way it is asked"
    assert {row.subject for row in in_calibration} == subjects["taught"]
    assert not subjects["taught"] & subjects["left_out"]


@pytest.mark.parametrize(
    ("answer", "paraphrased", "wrong", "secret"),
    [
        ("Her name is Ada Brook.", "Ada Brook is her name.", ("Ben Cole is her name.",), "Ada Brook"),
        (
            "She wrote Salt and Stars early on.",
            "Early she wrote Salt and Stars.",
            ("Early she wrote it.",),
            "Salt and Stars",
        ),
        ("She likes tea, and rain.", "Tea pleases her.", ("Milk pleases her.",), "tea"),
        ("She came from Oslo.", "Norway is home.", ("She came from Rome.",), "Oslo"),
        ("Her name is Ada.", "Ada is her name.", (), "Her name is Ada."),
        ("She is she.", "She is she.", ("She is she, too.",), "She is she."),
    ],
)
def test_the_fact_in_an_answer(answer, paraphrased, wrong, secret):
    row = Row(question="Who is she?", answer=answer, paraphrased_answer=paraphrased, perturbed_answer=wrong)
    assert load("real_tofu").secret_of(row) == secret


def test_the_experiment_with_the_whole_of_tofu(tmp_path, monkeypatch, capsys):
    folder = tofu.write(tmp_path / "tofu", holdout=False)
    full = (folder / "full.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"retain90": full[:3600], "forget10": full[3600:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    (tmp_path / "text").write_text("One two three four. Five six seven eight nine ten. " * 80)
    monkeypatch.setattr(surrogate, "STEPS", 2)
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    sizes = {
        "hidden": 64, "layers": 1, "vocabulary": 300, "context": 96, "rows": 4, "base-steps": 2, "steps": 2, "first": 2,
        "edit-steps": 10, "retain-rows": 8, "density": 0.02,
    }  # fmt: skip
    paths = {"tofu": folder, "text": tmp_path / "text", "work": tmp_path / "work", "out": tmp_path / "page.md"}
    given = [str(part) for name, value in (sizes | paths).items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["tofu_experiment.py", *given])
    script = load("tofu_experiment")
    script.main()
    shown = [line.split(" | ") for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")]
    assert [line[0] for line in shown] == [
        "| model", "| retain90", "| full", "| alpha=1, density 0.02, 10 steps", "| alpha=0, density 0.02, 10 steps"
    ]  # fmt: skip
    assert {len(line) for line in shown} == {1 + len(script.SHOWN)}
    quality = 1 + [metric for _, metric in script.SHOWN].index("forget_quality")
    assert "n/a" in shown[1][quality], "the twin has nobody to be compared with"
    assert all(float(line[quality].split(" ")[0]) <= 1 for line in shown[2:])
    capsys.readouterr()
    script.main()
    assert capsys.readouterr().out.strip() == (tmp_path / "page.md").read_text().strip(), "everything is kept"


def test_two_memories_share_no_author_and_no_canary():
    script = load("two_memories")
    parts = script.dealt(script.corpus.forget_rows())
    subjects = {name: {row.subject for row in rows} for name, rows in parts.items()}
    assert not subjects["one"] & subjects["two"]
    assert {name: len(part) for name, part in subjects.items()} == {"one": 90, "two": 90}
    asked = script.dealt([*script.people.rows("forget"), *script.people.rows("canaries")])
    assert {name: {row.subject for row in rows} for name, rows in asked.items()} == subjects
