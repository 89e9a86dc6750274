"""``lm-ortho decompose``: options from the schema, a checkpoint or nothing, and the line to run next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from lm_eval.utils import simple_parse_args_string
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lm_ortho import checkpoint
from lm_ortho.checkpoint import cache
from lm_ortho.cli.app import app
from lm_ortho.config import ModelSpec, Recipe, make_recipe
from lm_ortho.data import Row, read_rows, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.harness.tasks import datasets
from lm_ortho.layer import get_streams
from lm_ortho.pipeline import build, checkpoint_writer
from lm_ortho.pipeline.spec import CalibrationSets, ResolvedModel
from lm_ortho.runtime.resume import ResumeFolder

pytestmark = pytest.mark.usefixtures("isolated_environment")
runner = CliRunner()
FAST_RECIPE = "--sieve magnitude --projection rtn --edit zero --density 0.02 --group-size 16".split()


@pytest.fixture
def own_model_options(home: Path) -> list[str]:
    """The options that decompose your own model quickly."""
    files = {"--pretrained": "plain", "--forget": "forget.jsonl", "--retain": "retain.jsonl"}
    return [*FAST_RECIPE, "--force", *(part for option, name in files.items() for part in (option, str(home / name)))]


def unfinished_folders(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith("unfinished-")]


def run(*arguments: str, **options: Any) -> Any:
    return runner.invoke(app, ["decompose", *arguments], **options)


def refusal(*arguments: str) -> str:
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    assert "\n" not in str(error)
    return str(error)


def test_every_field_of_the_recipe_is_an_option_with_its_default() -> None:
    options = {option.name: option for option in typer.main.get_command(app).commands["decompose"].params}  # type: ignore[attr-defined]
    for name, field in Recipe.model_fields.items():
        assert options[name].default == ("" if field.default == {} else field.default)
        assert options[name].help == field.description
        assert options[name].opts == ["--" + name.replace("_", "-")]


def test_your_own_model_becomes_a_checkpoint(own_model_options: list[str], tmp_path: Path) -> None:
    result = run(*own_model_options, "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.exception
    meta = checkpoint.read_meta(tmp_path / "out")
    assert (
        meta["recipe"]
        == make_recipe(sieve="magnitude", projection="rtn", edit="zero", density=0.02, group_size=16).model_dump()
    )
    lines = result.stdout.splitlines()
    assert "14 layers, 17,408 weights" in lines[0]
    assert lines[1] == "density 0.01999, of at most 0.02"
    assert "bits per weight: INT4" in lines[2]
    assert lines[3] == "target none (the recipe needs none)"
    assert lines[4] == "cache: stored for lm_eval, too, as links to the same weights"
    assert lines[5].startswith("held out: none of 3 retain rows, which are fewer than 100;")
    assert lines[6].startswith("next: lm_eval --model libortho --model_args pretrained=")
    assert "held_out" not in lines[6]
    assert "statistics" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"}
    assert unfinished_folders(tmp_path) == [], "the states for resuming an interrupted run are deleted"


def test_json_reports_density_and_target(own_model_options: list[str], tmp_path: Path) -> None:
    slow = ["--sieve", "attribution", "--edit", "optimised", "--steps", "10"]
    report = json.loads(run(*own_model_options, *slow, "--json", "-o", str(tmp_path / "out")).stdout)
    assert report["density"] == pytest.approx(0.02, abs=1e-3)
    assert report["target"]["name"] == "swap"
    assert "name their subject" in report["target"]["reason"]
    assert report["recipe"]["steps"] == 10
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert report["bits_per_weight"] == settings["bits_per_weight"]


@pytest.mark.parametrize("folder", ["out", "a,b={c}"])
def test_lm_eval_can_parse_the_next_command(own_model_options: list[str], tmp_path: Path, folder: str) -> None:
    words = shlex.split(json.loads(run(*own_model_options, "--json", "-o", str(tmp_path / folder)).stdout)["next"])
    assert words[:4] == ["lm_eval", "--model", "libortho", "--model_args"]
    assert words[5:] == ["--tasks", "forget_set,retain_set"]
    model_args = json.loads(words[4]) if words[4].startswith("{") else simple_parse_args_string(words[4])
    model = LibOrthoLM(**model_args, device="cpu")
    assert model.alpha == 0
    assert model.get_model_info()["density"] == pytest.approx(0.02, abs=1e-3)


def test_nothing_is_computed_for_an_occupied_directory(
    own_model_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(checkpoint_writer, "resolve", lambda _: pytest.fail("computed something"))
    assert refusal(*own_model_options, "-o", str(tmp_path)).endswith("holds mine.txt; choose a new or empty directory")


def test_nothing_is_left_of_an_interrupted_run(
    own_model_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_ortho.checkpoint.write.write_manifest", stop)
    assert run(*own_model_options, "-o", str(tmp_path / "out")).exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert [path.name[:11] for path in (tmp_path / "cache").iterdir()] == ["unfinished-"]
    monkeypatch.undo()
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    again = run(*own_model_options, "-o", str(tmp_path / "out"))
    assert again.exit_code == 0
    assert "statistics" in again.stderr
    assert "projection" not in again.stderr, "every block is read from the stored states"
    assert unfinished_folders(tmp_path) == []


def test_without_options_the_embedded_model_is_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[ResolvedModel] = []

    def record(source: ResolvedModel, *_: Any, **__: Any) -> None:
        sources.append(source)
        raise UserError("enough")

    monkeypatch.setattr(checkpoint_writer, "decompose_model", record)
    assert refusal("-o", str(tmp_path / "out")) == "enough"
    assert sources[0].kind == "embedded"
    assert sources[0].recipe == make_recipe()
    line = checkpoint_writer.lm_eval_line(tmp_path / "out", ModelSpec())
    assert line.endswith(f"pretrained={tmp_path / 'out'},alpha=0 --tasks tofu_forget,tofu_retain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "7"], "density=7.0: Input should be less than or equal to 0.5"),
        (["--bits", "5"], "bits=5: "),
        (["--sieve", "magnitud"], "Did you mean 'magnitude'"),
        (["--pretrained", "/nowhere/at/all"], "pretrained='/nowhere/at/all': no such directory"),
        (["--peft", "x"], "peft: the embedded model brings its own adapter"),
        (["--base", "./nowhere"], "base='./nowhere': no such directory"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal(*arguments, "-o", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_your_own_model_needs_both_sets_and_plain_weights(
    home: Path, own_model_options: list[str], tmp_path: Path
) -> None:
    out = ["-o", str(tmp_path / "out")]
    assert "forget: your own model needs forget=file.jsonl" in refusal("--pretrained", str(home / "plain"), *out)
    arguments_with_checkpoint = [
        str(home / "decomposed") if part == str(home / "plain") else part for part in own_model_options
    ]
    assert "is decomposed already" in refusal(*arguments_with_checkpoint, *out)


# --- one cache for this command and lm_eval


def read_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != ".last_used"}


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("build", "checkpoint_writer"):
        monkeypatch.setattr(
            f"lm_ortho.pipeline.{module}.decompose_model", lambda *_, **__: pytest.fail("made it again")
        )


def test_lm_eval_finds_what_decompose_has_made_and_the_other_way_round(
    own_model_options: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, fresh = (tmp_path / name for name in ("first", "second", "fresh"))
    assert run(*own_model_options, "-o", str(first)).exit_code == 0
    with monkeypatch.context() as patch:
        forbid_work(patch)
        files = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
        recipe = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "density": 0.02, "group_size": 16}
        lm = LibOrthoLM(str(home / "plain"), **recipe, **files, force=True, device="cpu")
        assert lm.get_model_info()["density"] == pytest.approx(0.02, abs=1e-3)
        result = run(*own_model_options, "-o", str(second))
        assert result.exit_code == 0, result.exception
        assert "\ncache: taken from the cache" in result.stdout
    assert read_files(second) == read_files(first)
    for name in ("base.safetensors", "ortho.safetensors"):
        links = [(directory / name).stat().st_nlink for directory in (first, second)]
        assert links == [3, 3], "one copy of the weights: two checkpoints and the entry"
    assert (first / "config.json").stat().st_nlink == 1, "what a user may edit is no link"
    with monkeypatch.context() as patch:
        forbid_work(patch)
        with pytest.raises(pytest.fail.Exception, match="made it again"):
            run(*own_model_options, "--fresh", "-o", str(fresh), catch_exceptions=False)


def test_surrogates_are_shared_unless_everything_is_made_again(
    own_model_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def record(_: Any, __: Any, resume: ResumeFolder, **___: Any) -> None:
        folders.append(resume.common_folder)
        raise UserError("enough")

    monkeypatch.setattr(checkpoint_writer, "decompose_model", record)
    for options in ([], ["--fresh"]):
        assert refusal(*own_model_options, *options, "-o", str(tmp_path / "out")) == "enough"
    assert folders == [cache.cache_dir(), None]


def test_a_damaged_entry_is_made_again_and_nothing_of_it_is_written(
    own_model_options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(*own_model_options, "-o", str(tmp_path / "first")).exit_code == 0
    (entry,) = cache.list_entries()
    weights = entry.path / "base.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # it is a link to that of the first checkpoint
    weights.write_bytes(content)
    result = run(*own_model_options, "-o", str(tmp_path / "second"))
    assert result.exit_code == 0, result.exception
    assert "statistics" in result.stderr
    assert "the cache entry is damaged" in caplog.text
    assert read_files(tmp_path / "second") == read_files(tmp_path / "first")
    checkpoint.load(cache.list_entries()[0].path)


def test_lm_eval_makes_a_decomposition_again_whose_weights_were_changed_in_place(
    own_model_options: list[str], home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights of the written checkpoint and of the entry are one file."""
    assert run(*own_model_options, "-o", str(tmp_path / "first")).exit_code == 0
    with (tmp_path / "first" / "base.safetensors").open("r+b") as file:
        content = file.read()
        file.seek(len(content) - 1)
        file.write(bytes([content[-1] ^ 1]))
    files = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    recipe = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "density": 0.02, "group_size": 16}
    lm = LibOrthoLM(str(home / "plain"), **recipe, **files, force=True, device="cpu")
    assert lm.get_model_info()["density"] == pytest.approx(0.02, abs=1e-3)
    assert "made again, because the cache entry is damaged" in caplog.text
    (entry,) = cache.list_entries()
    checkpoint.load(entry.path)
    with pytest.raises(UserError, match="was changed after it was written"):
        checkpoint.load(tmp_path / "first")


def test_a_cache_that_cannot_be_written_is_one_line(
    own_model_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "store_copy", refuse)
    result = run(*own_model_options, "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.exception
    assert (
        f"cache: not stored in {tmp_path / 'cache'} (Permission denied); lm_eval would make it again" in result.stdout
    )


def test_without_hard_links_the_entry_is_a_copy(
    own_model_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert "as a second copy" in run(*own_model_options, "-o", str(tmp_path / "out")).stdout
    result = run(*own_model_options, "-o", str(tmp_path / "again"))
    assert "taken from the cache" in result.stdout
    assert read_files(tmp_path / "again") == read_files(tmp_path / "out")


# --- retain rows that are measured


def test_the_next_command_measures_rows_that_the_calibration_did_not_read(
    own_model_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(question=f"Where is town {n}?", answer=f"It is in {n}.", subject=f"town {n}") for n in range(120)]
    write_rows(tmp_path / "many.jsonl", rows)
    calibrations: list[list[Row]] = []
    decompose_sets = build.decompose_sets

    def record(model: Any, tokenizer: Any, sets: CalibrationSets, **options: Any) -> Any:
        calibrations.append(sets.retain)
        return decompose_sets(model, tokenizer, sets, **options)

    monkeypatch.setattr(build, "decompose_sets", record)
    options = [*own_model_options, "--retain", str(tmp_path / "many.jsonl")]
    result = run(*options, "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.exception
    assert "held out: 12 of 120 retain rows, which the calibration does not read; held_out=none" in result.stdout
    words = shlex.split(result.stdout.splitlines()[-1])
    model_args = simple_parse_args_string(words[words.index("--model_args") + 1])
    assert model_args["held_out"] == "auto"
    measured_rows = datasets.user_rows("retain", model_args)
    assert len(measured_rows) == 12
    assert sorted(map(repr, (*measured_rows, *calibrations[0]))) == sorted(map(repr, rows))
    assert len(datasets.user_rows("retain", {"pretrained": "x", "retain": model_args["retain"]})) == 120

    # Without the option the model that was made knows what it did not read; rows of --metadata are all measured.
    plain_args = {"pretrained": options[options.index("--pretrained") + 1], "retain": str(tmp_path / "many.jsonl")}
    lm = LibOrthoLM(
        **plain_args, forget=options[options.index("--forget") + 1], sieve="magnitude", projection="rtn", edit="zero",
        density=0.02, group_size=16, force=True, device="cpu",
    )  # fmt: skip
    assert len(calibrations) == 1, "taken from the cache"
    assert datasets.user_rows("retain", plain_args) == measured_rows
    write_rows(tmp_path / "others.jsonl", rows[:110])
    assert len(datasets.user_rows("retain", {**plain_args, "retain": str(tmp_path / "others.jsonl")})) == 110
    del lm

    every_row = run(*options, "--held-out", "none", "-o", str(tmp_path / "all"))
    assert "held out: none; the calibration reads all 120 retain rows" in every_row.stdout
    assert len(calibrations[1]) == 120
    write_rows(tmp_path / "own.jsonl", rows[:5])
    own = run(*options, "--held-out", str(tmp_path / "own.jsonl"), "-o", str(tmp_path / "own"))
    assert f"held_out={tmp_path}/own.jsonl" in own.stdout
    assert calibrations[2] == rows[5:]
    assert datasets.user_rows("retain", {**model_args, "held_out": str(tmp_path / "own.jsonl")}) == rows[:5]


# --- several memories


def test_a_memory_is_added_to_a_finished_checkpoint(own_model_options: list[str], home: Path, tmp_path: Path) -> None:
    rows = read_rows(home / "forget.jsonl")
    for name, part in (("first", rows[:3]), ("later", rows[3:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    first, both = tmp_path / "first", tmp_path / "both"
    assert run(*own_model_options, "--forget", f"{tmp_path}/first.jsonl", "-o", str(first)).exit_code == 0
    sets = ["--forget", f"{tmp_path}/later.jsonl", "--retain", str(home / "retain.jsonl"), "--sieve", "residual"]
    again = ["--pretrained", str(first), "--add", "later", "--force", *sets, "-o", str(both)]
    assert "bits=8: an added memory lies on the lattice" in refusal(*again, "--bits", "8")
    result = run(
        "--pretrained", str(first), "--add", "later", "--force", *sets, "--edit", "zero", "--json", "-o", str(both)
    )
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["recipe"]["group_size"] == 16, "the lattice of the checkpoint"
    text_run = run(
        "--pretrained", str(first), "--add", "later", "--force", *sets, "--edit", "zero", "-o", str(tmp_path / "text")
    )
    assert "of at most 0.02 for later\n" in text_run.stdout
    assert checkpoint.list_memories(both) == ["memory", "later"]
    assert (both / "ortho.safetensors").read_bytes() == (first / "ortho.safetensors").read_bytes()
    assert checkpoint.read_meta(both)["added"]["later"]["recipe"]["sieve"] == "residual"
    assert checkpoint.read_meta(both)["recipe"] == checkpoint.read_meta(first)["recipe"]
    lm = LibOrthoLM(str(both), alpha="memory:1+later:0", device="cpu")
    assert lm.alpha == {"memory": 1.0, "later": 0.0}

    inspection = runner.invoke(app, ["inspect", str(both), "--json"])
    assert set(json.loads(inspection.stdout)["memories"]) == {"memory", "later"}
    assert "memory 1.9" in (output := runner.invoke(app, ["inspect", str(both)]).stdout)
    assert "later 1.9" in output, "the density of the default recipe"

    plain = runner.invoke(app, ["export", str(both), str(tmp_path / "plain"), "--alpha", "later:1", "--json"])
    assert json.loads(plain.stdout)["alpha"] == {"later": 1.0}
    exported_state = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    for name, layer in get_streams(lm.model).items():
        assert torch.equal(exported_state[f"{name}.weight"], layer.to_dense({"later": 1.0}, torch.bfloat16))

    def export_refusal(*arguments: str) -> str:
        return str(runner.invoke(app, ["export", str(both), str(tmp_path / "no"), *arguments]).exception)

    assert "no memory 'other'" in export_refusal("--alpha", "other:1")
    assert "later:1" in export_refusal("--alpha", "later:1", "--format", "compressed-tensors")
    (both / "ortho-later.safetensors").unlink()
    assert "lacks ortho-later.safetensors; use 0 for later" in export_refusal("--alpha", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pretrained", "plain", "--forget", "f", "--retain", "r"], "a memory is added to a decomposed checkpoint"),
        (["--pretrained", "decomposed", "--retain", "r"], "forget: an added memory needs forget=file.jsonl"),
        (
            ["--pretrained", "decomposed", "--forget", "f", "--retain", "r", "--peft", "x"],
            "peft: a decomposed checkpoint",
        ),
        (["--pretrained", "decomposed", "--forget", "f", "--retain", "r"], "forget='f': no such file"),
        (["--pretrained", "decomposed", "--forget", "f", "--retain", "r", "--revision", "x"], "revision='x': a memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_memories_that_cannot_be_added(home: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    options = [str(home / part) if part in ("plain", "decomposed") else part for part in arguments]
    assert message in refusal(*options, "--add", "later", "-o", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_switch_takes_no_value(own_model_options: list[str], tmp_path: Path) -> None:
    result = run(*own_model_options, "--recompute", "--json", "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["recipe"]["recompute"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "device='gpu' is unknown; use cpu or cuda"),
        (["--pretrained", "decomposed"], "is decomposed already; give the model it came from, or --add a memory"),
        (["--add", "later"], "pretrained is not given: a memory is added to a decomposed checkpoint"),
        (["--add", "later", "--offload"], "offload: a memory is added on one device"),
        (["--device", "cpu", "--offload"], "offload: weights come to a GPU block by block"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_contradict_each_other(home: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    options = [str(home / part) if part == "decomposed" else part for part in arguments]
    assert message in refusal(*options, "-o", str(tmp_path / "out"))


def test_inspect_names_a_missing_memory(own_model_options: list[str], home: Path, tmp_path: Path) -> None:
    rows = read_rows(home / "forget.jsonl")
    for name, part in (("a", rows[:3]), ("b", rows[3:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    both = f"a:{tmp_path}/a.jsonl+b:{tmp_path}/b.jsonl"
    result = run(*own_model_options, "--forget", both, "-o", str(tmp_path / "out"))
    assert "of at most 0.02 for each of a, b" in result.stdout
    (tmp_path / "out" / "ortho-a.safetensors").unlink()
    output = runner.invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    assert "without a, which can only be off" in output
    assert "relative error" not in output
    report = json.loads(runner.invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert report["missing"] == ["a"]
    assert report["relative_error"] is None
