"""Usual operations on checkpoints: saving again, in place, in one expression; moving single files by hand."""

from __future__ import annotations

import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lm_ortho.checkpoint import attach, hf, load, read_meta, save
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.export import export
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.layer import linear_form, ortho_layers, patch
from tests.support import architectures, tiny
from tests.support.checkpoint import META, assert_same_model, tokenizer

torch.set_num_threads(1)
hf.register()


def from_pretrained(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def file_names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


@pytest.mark.parametrize("with_readme", [False, True])
def test_saving_again_in_place_keeps_the_tokenizer(saved_checkpoint, directory, with_readme):
    if with_readme:
        (directory / "README.md").write_text("mine")
    before = file_names(directory)
    assert "tokenizer.json" in before
    from_pretrained(directory).save_pretrained(directory)
    assert file_names(directory) == before
    assert_same_model(saved_checkpoint[0], load(directory))
    assert AutoTokenizer.from_pretrained(directory)("w3")["input_ids"] == [3]


def test_a_new_tokenizer_replaces_the_old_one(saved_checkpoint, directory):
    (directory / "vocab.txt").write_text("old")
    save(directory, saved_checkpoint[0], None, META)  # not in a manifest, so an unrelated file
    assert (directory / "vocab.txt").exists()
    save(directory, saved_checkpoint[0], tokenizer(), META)
    assert "tokenizer.json" in file_names(directory)


def test_calls_on_a_model_without_another_reference(saved_checkpoint, directory, tmp_path):
    from_pretrained(directory).save_pretrained(tmp_path / "again")
    assert_same_model(saved_checkpoint[0], load(tmp_path / "again"))
    ids = tiny.tokens(1, 4)
    assert load(directory).generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 6)
    assert load(directory).eval().forward(ids).logits.shape[:2] == (1, 4)


def test_a_called_model_is_freed_at_once(directory):
    model = load(directory)
    model(tiny.tokens(1, 4))
    layer = weakref.ref(next(iter(ortho_layers(model).values())))
    del model
    assert layer() is None


def test_a_model_patched_by_hand_is_not_saved_as_something_else(saved_checkpoint, tmp_path):
    model = tiny.patched_model()
    with pytest.raises(UserError, match=r"patched by hand; call lm_ortho\.checkpoint\.attach"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    attach(model)
    model.save_pretrained(tmp_path / "out")
    assert_same_model(saved_checkpoint[0], load(tmp_path / "out"))


def test_a_checkpoint_in_the_working_directory(saved_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # empty, then over an older one
        save(".", saved_checkpoint[0], tokenizer(), META)
        assert "manifest.json" in file_names(Path())
        assert not [name for name in file_names(Path()) if "tmp" in name]
        assert_same_model(saved_checkpoint[0], load("."))


def test_a_mount_point_is_overwritten_file_by_file(saved_checkpoint, directory, monkeypatch):
    """A mount point cannot be renamed, but the files in it can be replaced."""
    monkeypatch.setattr("lm_ortho.checkpoint.write.os.path.ismount", lambda path: Path(path) == directory)
    monkeypatch.setattr("lm_ortho.checkpoint.write._swap", None)
    before = file_names(directory)
    save(directory, saved_checkpoint[0], None, META)
    assert file_names(directory) == before
    assert_same_model(saved_checkpoint[0], load(directory))


def test_the_ortho_file_of_another_checkpoint(saved_checkpoint, directory, tmp_path):
    """A checkpoint published without its ortho file, next to the ortho file of another checkpoint."""
    (directory / "ortho.safetensors").unlink()
    from_pretrained(directory).save_pretrained(tmp_path / "published")
    shutil.copy(saved_checkpoint[1] / "ortho.safetensors", tmp_path / "published")
    for load_function in (load, read_contents, lambda path: export(path, tmp_path / "out", alpha=1), from_pretrained):
        with pytest.raises(UserError, match=r"ortho\.safetensors is not listed in manifest\.json"):
            load_function(tmp_path / "published")


def test_an_export_has_the_tokenizer_that_was_saved_later(saved_checkpoint, tmp_path):
    from_pretrained(saved_checkpoint[1]).save_pretrained(tmp_path / "checkpoint")
    tokenizer().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "README.md").write_text("about the checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("w3")["input_ids"] == [3]
    assert "README.md" not in file_names(tmp_path / "plain")


@pytest.mark.parametrize(
    ("case", "message"),
    [("Falcon", "is a FalconLinear, not an nn.Linear"), ("Mixtral", "a part of experts in one tensor")],
)
def test_layers_that_the_packed_format_cannot_hold(case, message, tmp_path):
    model = architectures.CASES[case].build()
    with linear_form(model):
        streams = tiny.model_streams(model, group_size=8)
    patch(model, streams)
    save(tmp_path / "checkpoint", model)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "checkpoint", tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_the_older_name_of_dtype(directory):
    assert load(directory, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_brackets_in_a_path_are_not_markup(directory, tmp_path):
    place = tmp_path / "x[red]y[" / "b]"
    place.parent.mkdir()
    directory.rename(place)
    result = CliRunner().invoke(app, ["inspect", str(place)])
    assert result.exit_code == 0
    assert f"{place}: base and ortho stream" in result.stdout.replace("\n", "")


def test_a_subfolder_of_a_repository(saved_checkpoint, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("a" * 40) / "sub" / "folder"
    snapshot.mkdir(parents=True)
    shutil.copy(saved_checkpoint[1] / "base.safetensors", snapshot)
    model, requests = tiny.llama(), []
    model.config._name_or_path = "someone/model"
    monkeypatch.setattr(
        sys.modules["transformers.utils"], "cached_file", lambda *args, **kwargs: requests.append((args, kwargs))
    )
    assert hf._find_ortho("ortho.safetensors", snapshot / "base.safetensors", model) is None
    ((args, kwargs),) = requests
    assert args == ("someone/model", "ortho.safetensors")
    assert {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder")} == {
        "cache_dir": tmp_path,
        "revision": "a" * 40,
        "subfolder": "sub/folder",
    }


def test_a_repository_that_cannot_be_reached_for_the_ortho_file(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("someone/model is not a valid model identifier")

    model = tiny.llama()
    model.config._name_or_path = "someone/model"
    monkeypatch.setattr(sys.modules["transformers.utils"], "cached_file", refuse)
    with pytest.raises(UserError, match=r"ortho\.safetensors could not be fetched .* set HF_TOKEN"):
        hf._find_ortho("ortho.safetensors", tmp_path / "base.safetensors", model)


def test_meta_survives_saving_again(directory):
    from_pretrained(directory).save_pretrained(directory)
    assert read_meta(directory) == META
