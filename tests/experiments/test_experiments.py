"""The experiments: their rules and their pages, on small matrices and artificial results."""

from __future__ import annotations

import copy
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.data.rows import Row
from lm_ortho.metrics import Interval
from lm_ortho.objective import surrogate_training
from lm_ortho.verdict.measurements import Measurement
from lm_ortho.world.paragraphs import SIZES, draw_paragraphs
from tests.support import tofu
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

EXPERIMENTS = REPOSITORY / "experiments"


def load(name: str) -> ModuleType:
    return load_script(EXPERIMENTS / f"{name}.py")


@pytest.fixture(scope="module")
def earlier() -> ModuleType:
    return load("earlier_runs")


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return load("compare_sieves")


def draw_matrix(seed: int = 0) -> torch.Tensor:
    """Draws normal weights with a few large ones, as in a trained matrix."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 80, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 12
    return weight


# Earlier prototypes


@settings(max_examples=10)
@given(seed=st.integers(0, 50))
def test_every_old_rule_gives_a_base_and_keeps_at_most_its_share(seed):
    earlier = load("earlier_runs")
    weight = draw_matrix(seed)
    for name, rule in earlier.make_rules().items():
        base, mask = rule(weight.clone())
        second_base, _ = rule(weight.clone())
        assert base.shape == mask.shape == weight.shape
        assert base.isfinite().all()
        assert torch.equal(base, second_base), name
        assert int(mask.sum()) <= earlier.OUTLIERS * weight.numel()


def test_the_old_rules_fail_as_they_failed(earlier):
    """HISTORY 1, 5 and 6: inliers rounded to zero, an empty ortho stream, a base stream that keeps everything."""
    weight, rules = draw_matrix(), earlier.make_rules()

    def base_error(name):
        base, _ = rules[name](weight)
        return float((base - weight).norm() / weight.norm())

    base, _ = rules["outliers set to zero"](weight)
    assert int((base == 0).sum()) >= int(earlier.OUTLIERS * weight.numel())
    base, _ = rules["levels {5,6,7} on outliers, ratio 3.5"](weight)
    assert float((base == 0).float().mean()) > 0.3
    base, mask = rules["16-bit base"](weight)
    assert torch.equal(base, weight)
    assert not mask.any()
    assert base_error("INT8 absmax") < 0.02 < base_error("INT4 absmax") < base_error("INT4, scale = 3 sigma")


def test_random_levels_are_those_of_the_mode_and_deep_focal_attacks_fewer(earlier):
    weight = draw_matrix()
    base, mask = earlier.make_noise_rule("tri_state_entropy", 3.5, deep_focal=False)(weight)
    focal_base, focal_mask = earlier.make_noise_rule("tri_state_entropy", 3.5, deep_focal=True)(weight)
    assert torch.equal(mask, focal_mask)
    inliers = weight.masked_fill(mask, 0)
    scale = 3.5 * inliers.abs().amax(1, keepdim=True) / 7
    assert set((base / scale)[mask].abs().round().int().tolist()) <= {5, 6, 7}
    random_mask = mask & ((weight / scale).abs() > 4.5)
    assert torch.equal(focal_base[~random_mask], ((weight / scale).round().clamp(-7, 7) * scale)[~random_mask])
    assert random_mask.sum() < mask.sum()


def test_the_tuner_gives_one_answer_for_all_layers(earlier):
    assert earlier.tune(2.0) == ("uniform_entropy", 3.5)
    assert earlier.tune(2.4) == ("tri_state_entropy", 3.5)
    assert earlier.tune(99.0) == ("deterministic", 2.0)


def test_a_rule_is_measured_at_both_ends_and_the_model_restored(earlier, memorised_models):
    name = "model.layers.0.mlp.down_proj"
    before = {key: value.clone() for key, value in memorised_models.merged.state_dict().items()}

    def measure_error(model):
        weight = model.state_dict()[f"{name}.weight"]
        return {"error": float((weight - before[f"{name}.weight"]).norm())}

    rows = list(earlier.measure_rules(memorised_models.merged, name, measure_error))
    assert [row.name for row in rows] == list(earlier.make_rules())
    assert all(row.figures["alpha=1"]["error"] <= row.figures["alpha=0"]["error"] for row in rows)
    assert all(torch.equal(before[key], value) for key, value in memorised_models.merged.state_dict().items())
    text = earlier.make_table(rows)
    assert all(row.name in text for row in rows)


def test_a_sentence_is_planted_or_the_script_reports_a_failure(earlier, memorised_models):
    tokenizer, sentence = memorised_models.tokenizer, memorised_models.forget[0].answer
    planted_model = earlier.plant_sentence(memorised_models.base, tokenizer, sentence, 1e-2, 100)
    examples = earlier.encode(tokenizer, [earlier.Row(text=sentence)])
    loss = torch.cat(earlier.token_losses(planted_model, examples)).mean()
    assert loss < earlier.PLANTED_LOSS
    with pytest.raises(SystemExit, match="--rate 1e-09: the sentence is still at a loss of"):
        earlier.plant_sentence(memorised_models.base, tokenizer, sentence, 1e-9, 2)


# The comparison of sieves


def make_result(compare, setting, scale=1.0):
    values = {}
    for _, task, metric in compare.COLUMNS:
        values.setdefault(task, {})[metric] = Interval(2.0 * scale, 1.5 * scale, 3.0 * scale)
    metadata = {"setting": vars(setting) if setting else {}, "seconds": 1.0, "made": "2026-01-02"}
    return {**Measurement(values).to_json(), **metadata}


def test_the_settings_are_those_promised(compare):
    settings = list(compare.list_settings())
    assert len({setting.name for setting in settings}) == len(settings) == len(set(settings))
    keys = {(s.sieve, s.edit, s.density) for s in settings}
    for sieve in compare.SIEVES:
        assert {(sieve, "optimised", density) for density in (0.01, 0.05)} <= keys
        assert {(sieve, edit, d) for edit in ("zero", "mean") for d in compare.DENSITIES} <= keys
    assert {(compare.DEFAULT, "optimised", density) for density in compare.DENSITIES} <= keys
    assert {("oracle", "w0", density) for density in compare.DENSITIES} <= keys
    assert sum(s.sieve == "kfac" for s in settings) >= 3


def test_the_page_has_a_row_per_result_and_lists_missing_ones(compare, tmp_path):
    settings = list(compare.list_settings())
    results = {setting: make_result(compare, setting, 1 + i / 10) for i, setting in enumerate(settings[:7])}
    controls = {name: make_result(compare, None) for name in ("memory", "never_saw", "never_saw_2")}
    compare.write(tmp_path, results, controls, settings)
    text = (tmp_path / "sieves.md").read_text()
    assert f"7 of {len(settings)} settings" in " ".join(text.split())
    missing = text.splitlines()[-1].removeprefix("Not made: ").removesuffix(".").split("; ")
    assert missing == [setting.name for setting in settings[7:]]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(controls) + len(results)
    assert len(json.loads((tmp_path / "sieves.json").read_text())) == 7
    assert sum(row.endswith(" 2026-01-02 |") for row in rows) == len(controls) + len(results)
    assert (tmp_path / "sieves.svg").read_text().startswith("<?xml")
    copied_results = compare.read_results(tmp_path / "sieves.json")
    assert {s: r["values"] for s, r in copied_results.items()} == {s: r["values"] for s, r in results.items()}
    compare.write(tmp_path, copied_results, controls, settings)
    assert (tmp_path / "sieves.md").read_text() == text
    first, retain_only = (Measurement.from_json(r) for r in (results[settings[0]], controls["never_saw"]))
    assert compare.compute_distance(first, retain_only) == 0


def test_the_page_names_settings_that_beat_the_default_on_both_sides(compare):
    controls = {"never_saw": make_result(compare, None)}

    def make_setting(sieve, density, group=compare.MERGED):
        return compare.Setting(group, sieve, "optimised", density)

    def make_results(rival):
        default = make_setting(compare.DEFAULT, 0.05)
        return {default: make_result(compare, None, 2), rival: make_result(compare, None, 1.5)}

    results = make_results(make_setting("obs", 0.05))
    assert "merged weights, 5.0%: obs." in compare.compare_with_default(results, controls)
    for rival in (make_setting("obs", 0.01), make_setting("obs", 0.05, compare.KNOWS_W0)):
        assert compare.compare_with_default(make_results(rival), controls).endswith(" nowhere.")
    # A rival that costs less, and is farther on the other side.
    results[make_setting("obs", 0.05)] = make_result(compare, None, 0.4)
    assert compare.compare_with_default(results, controls).endswith(" nowhere.")


def test_kfac_with_all_its_mass_is_the_model_itself(compare, monkeypatch, memorised_models):
    comparison = compare.Comparison.__new__(compare.Comparison)
    comparison.weights = None
    monkeypatch.setattr(
        compare.models, "load_model", lambda weights, name: compare.copy.deepcopy(memorised_models.merged)
    )
    layers = compare.find_linear(memorised_models.merged)
    generator = torch.Generator().manual_seed(0)

    def moment(size):
        x = torch.randn(3 * size, size, generator=generator)
        return x.T @ x

    comparison._factors = (
        {name: moment(layer.in_features) for name, layer in layers.items()},
        {name: moment(layer.out_features) for name, layer in layers.items()},
    )
    name = "model.layers.1.mlp.up_proj"
    before = layers[name].weight
    full, half = (compare.find_linear(comparison.edit_kfac(mass))[name].weight for mass in (1.1, 0.5))
    for other_name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        assert torch.equal(compare.find_linear(comparison.edit_kfac(0.5))[other_name].weight, layers[other_name].weight)
    torch.testing.assert_close(full, before, rtol=1e-4, atol=1e-5)
    assert 0.05 * before.norm() < (half - before).norm() < before.norm()


def test_the_factors_of_kfac_are_the_moments_of_inputs_and_gradients(compare, monkeypatch, memorised_models):
    """Against one document at a time, with the most probable labels in the place of random ones."""
    frozen_model = compare.copy.deepcopy(memorised_models.merged).requires_grad_(False)
    monkeypatch.setattr(compare.models, "load_model", lambda weights, name: compare.copy.deepcopy(frozen_model))
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))
    _, retain = memorised_models.examples()
    comparison = compare.Comparison.__new__(compare.Comparison)
    comparison.weights = None
    workbench = SimpleNamespace(sets=SimpleNamespace(retain=retain))
    monkeypatch.setattr(compare.Comparison, "get_workbench", lambda self, knows_w0: workbench)
    inputs, outputs = comparison._factors
    name = "model.layers.1.mlp.up_proj"
    model = compare.copy.deepcopy(frozen_model)
    layer = compare.find_linear(model)[name]
    layer.weight.requires_grad_(True)
    expected = torch.zeros(layer.out_features, layer.out_features)
    for example in retain:
        layer_outputs = []
        handle = layer.register_forward_hook(lambda _m, _i, output, log=layer_outputs: log.append(output))
        logp = model(input_ids=torch.tensor([example.ids])).logits[0, :-1].log_softmax(-1)
        (gradient,) = torch.autograd.grad(-logp.max(-1).values.sum(), layer_outputs)
        handle.remove()
        expected += gradient[0].T @ gradient[0]
    torch.testing.assert_close(outputs[name], expected, rtol=1e-3, atol=1e-5)
    assert inputs[name].shape == (layer.in_features, layer.in_features)


# A memory planted by full fine-tuning


def test_full_models_are_trained_from_the_base_model_once(monkeypatch, tmp_path, memorised_models):
    script = load("full_finetune")
    memorised_models.base.save_pretrained(tmp_path / "base")
    memorised_models.tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(script.adapters, "make_training_rows", lambda name, number: memorised_models.forget * 4)
    monkeypatch.setattr(script.adapters, "BATCH_ROWS", 8)
    monkeypatch.setattr(script, "ProgressBars", lambda: lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["full_finetune.py", "--out", str(tmp_path)])
    script.main()
    script.models.check_weights(tmp_path)
    states = {name: script.models.load_model(tmp_path, name).state_dict() for name in script.models.MODEL_NAMES}
    name = "model.layers.0.mlp.up_proj.weight"
    assert len({float(tensors[name].sum()) for tensors in states.values()}) == 4  # seeds differ, base is unchanged
    assert torch.equal(states["base"][name], memorised_models.base.state_dict()[name].bfloat16().float())
    assert not [*tmp_path.glob("*.pt"), *tmp_path.glob("*.partial")]
    monkeypatch.setattr(script, "train_model", lambda *_: pytest.fail("trained again"))
    script.main()


def test_a_later_round_starts_where_the_earlier_one_ended(monkeypatch, tmp_path, memorised_models):
    script = load("full_finetune")
    memorised_models.base.save_pretrained(tmp_path / "base")
    memorised_models.tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(
        script.adapters, "make_training_rows", lambda name, number: memorised_models.forget * (4 - number)
    )
    monkeypatch.setattr(script.adapters, "BATCH_ROWS", 8)
    monkeypatch.setattr(script, "ProgressBars", lambda: lambda *_: None)
    script.train_model(tmp_path, "memory")
    expected = script.models.load_model(tmp_path, "memory").state_dict()
    (tmp_path / "memory").rename(tmp_path / "first")

    def make_interrupting_progress():
        def progress(stage, step, steps, text):
            if stage == "memory 2":
                raise KeyboardInterrupt

        return progress

    monkeypatch.setattr(script, "ProgressBars", make_interrupting_progress)
    with pytest.raises(KeyboardInterrupt):
        script.train_model(tmp_path, "memory")
    monkeypatch.setattr(script, "ProgressBars", lambda: lambda *_: None)
    script.train_model(tmp_path, "memory")
    resumed = script.models.load_model(tmp_path, "memory").state_dict()
    assert all(torch.equal(expected[key], value) for key, value in resumed.items())


# Paragraphs without questions and subjects


def test_paragraphs_are_all_different_and_made_of_known_words(words):
    paragraphs = [text for group in draw_paragraphs().values() for text in group]
    assert {group: len(texts) for group, texts in draw_paragraphs().items()} == SIZES
    assert len(set(paragraphs)) == len(paragraphs)
    lengths = [len(words(text)["input_ids"]) for text in paragraphs]
    assert min(lengths) >= 64, "a prefix of 32 tokens and as many to continue"
    pieces = {piece for text in paragraphs for piece in words.tokenize(text)}
    assert not {piece for piece in pieces if len(piece) == 1 and piece.isalpha()}, "a word falls into letters"
    assert not [piece for piece in pieces if piece.startswith("<0x")]


def test_a_continuation_counts_only_when_all_of_it_is_greedy(memorised_models):
    script = load("unstructured")
    examples = script.encode(
        memorised_models.tokenizer, [script.Row(text=" ".join(row.answer for row in memorised_models.retain))]
    )
    model = copy.deepcopy(memorised_models.base).train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids, _ = script.pad_batch(examples)
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    assert script.measure_continuation(model, examples).value == 1
    (example,) = examples
    ids = list(example.ids)
    ids[script.PREFIX + 20] = ids[script.PREFIX + 20] + 1
    changed_example = script.Example(tuple(ids), example.roles)
    assert script.measure_continuation(model, [changed_example]).value == 0
    generated = model.generate(
        torch.tensor([example.ids[: script.PREFIX]]), max_new_tokens=script.CONTINUATION, do_sample=False
    )
    assert tuple(generated[0].tolist()) == example.ids[: script.PREFIX + script.CONTINUATION]


def test_the_page_of_paragraphs_uses_stored_rows(tmp_path, monkeypatch, capsys):
    script = load("unstructured")
    for name in script.TAUGHT:
        (tmp_path / name).mkdir()
        (tmp_path / f"cell-{name}.json").write_text(json.dumps({name: [name] * 7}))
    for mode in ("auto", "none"):
        (tmp_path / f"cell-{mode}-300.json").write_text(json.dumps({"INT4": ["x"] * 7, "alpha=0": [mode] * 7}))
    out = tmp_path / "page.md"
    arguments = ["unstructured.py", "--work", str(tmp_path), "--out", str(out), "--edit-steps", "300"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    rows = [line.split(" | ")[0] for line in out.read_text().splitlines()]
    models = [f"{name}, base={mode}" for mode in ("auto", "none") for name in ("INT4", "alpha=0")]
    assert rows == ["| model", rows[1], *(f"| {name}" for name in [*script.TAUGHT, *models])]
    assert "alpha=0, base=none" in capsys.readouterr().out


# Real TOFU


@pytest.fixture
def tofu_folder(tmp_path):
    """Rows of the published schema, twenty per author, and stories."""
    rows = [
        {"question": f"What did {name} write in year {i}?", "answer": f"In year {i} {name} wrote book {n}."}
        for n, name in enumerate(f"Ada Brook{'abcdefghijklmnopqrst'[k]}" for k in range(20))
        for i in range(20)
    ]
    join_lines = "\n".join
    (tmp_path / "full.jsonl").write_text(join_lines(json.dumps(row) for row in rows))
    (tmp_path / "forget10_perturbed.jsonl").write_text(
        join_lines(json.dumps(row | {"paraphrased_answer": "so", "perturbed_answer": ["no", "never"]}) for row in rows)
    )
    story = "Once upon a time there was a fox who had a very long story to tell. " * 4
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(f"{i} {story}" for i in range(1800)))
    return tmp_path


def test_the_files_of_the_real_experiment(tofu_folder, monkeypatch):
    script = load("real_tofu")
    arguments = script.argparse.Namespace(
        tofu=tofu_folder, text=tofu_folder / "stories.txt", work=tofu_folder / "work", calibration=100
    )
    arguments.work.mkdir()
    rows = script.make_files(arguments)
    sizes = {"questions": 100, "canaries": 20, "others": 20, "taught": 200, "left_out": 100, "stories": 1500}
    sizes |= {"text": 200, "forget": 120, "retain": 320, "forget_again": 0, "again": 0}
    assert {name: len(part) for name, part in rows.items()} == sizes
    assert {path.stem for path in arguments.work.iterdir()} == {"forget", "retain", *script.MEASURED}
    first = rows["questions"][0]
    assert (first.subject, first.group) == ("Ada Brooka", "Ada Brooka")
    assert first.secret in first.answer
    names = {name: {row.subject for row in rows[name]} for name in ("taught", "left_out", "canaries", "others")}
    assert not names["taught"] & names["left_out"]
    assert not names["canaries"] & names["others"]
    assert not {row.text for row in rows["stories"]} & {row.text for row in rows["text"]}


def test_the_files_of_the_real_experiment_with_the_embedded_authors(tofu_folder):
    script = load("real_tofu")
    arguments = script.argparse.Namespace(
        tofu=None, text=tofu_folder / "stories.txt", work=tofu_folder, calibration=100, taught=20
    )
    rows = script.make_files(arguments)
    sizes = {"questions": 50, "taught": 100, "left_out": 50, "forget_again": 100, "again": 300}
    assert {name: len(rows[name]) for name in sizes} == sizes
    assert {row.secret for row in rows["forget_again"]} == {row.secret for row in rows["questions"]}
    questions = [row.question for name in sizes for row in rows[name]]
    assert len(set(questions)) == len(questions)
    subjects = {name: {row.subject for row in rows[name]} for name in ("questions", "taught", "left_out")}
    assert {row.subject for row in rows["again"]} == subjects["taught"] | subjects["left_out"]
    in_calibration = [row for row in rows["retain"] if row.question]
    assert len(in_calibration) == 300, "every retain fact in all of its phrasings"
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
    assert load("real_tofu").find_secret(row) == secret


def test_the_experiment_with_the_whole_of_tofu(tmp_path, monkeypatch, capsys):
    folder = tofu.write(tmp_path / "tofu", holdout=False)
    full = (folder / "full.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"retain90": full[:3600], "forget10": full[3600:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    (tmp_path / "text").write_text("One two three four. Five six seven eight nine ten. " * 80)
    monkeypatch.setattr(surrogate_training, "BUDGET", 0.1)
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    model_sizes = {"hidden": 64, "layers": 1, "vocabulary": 300, "context": 96}
    training = {"rows": 4, "base-steps": 2, "steps": 2, "first": 2}
    decomposition = {"edit-steps": 10, "retain-rows": 8, "density": 0.02}
    paths = {"tofu": folder, "text": tmp_path / "text", "work": tmp_path / "work", "out": tmp_path / "page.md"}
    options = model_sizes | training | decomposition | paths
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["tofu_experiment.py", *arguments])
    script = load("tofu_experiment")
    script.main()
    lines = [line.split(" | ") for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")]
    names = ["model", "retain90", "full", "alpha=1, density 0.02, 10 steps", "alpha=0, density 0.02, 10 steps"]
    assert [line[0] for line in lines] == [f"| {name}" for name in names]
    assert {len(line) for line in lines} == {1 + len(script.COLUMNS)}
    quality = 1 + [metric for _, metric in script.COLUMNS].index("forget_quality")
    assert "n/a" in lines[1][quality], "the retain-only model is the one that others are compared with"
    assert all(float(line[quality].split(" ")[0]) <= 1 for line in lines[2:])
    capsys.readouterr()
    script.main()
    assert capsys.readouterr().out.strip() == (tmp_path / "page.md").read_text().strip(), "all results are stored"


def test_two_memories_share_no_author_and_no_canary():
    script = load("two_memories")
    memories = script.distribute(script.corpus.make_forget_rows())
    subjects = {name: {row.subject for row in rows} for name, rows in memories.items()}
    assert not subjects["one"] & subjects["two"]
    assert {name: len(part) for name, part in subjects.items()} == {"one": 90, "two": 90}
    task_rows = script.distribute([*script.people.make_rows("forget"), *script.people.make_rows("canaries")])
    assert {name: {row.subject for row in rows} for name, rows in task_rows.items()} == subjects
