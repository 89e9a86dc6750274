"""Damaged checkpoints are refused in one line, and a failed save leaves the old checkpoint unchanged."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lm_ortho.checkpoint import FORMAT_VERSION, hf, is_checkpoint, load, read_meta, save, write
from lm_ortho.checkpoint.manifest import write_manifest
from lm_ortho.errors import UserError
from lm_ortho.layer import patch
from tests.support import tiny
from tests.support.changed_checkpoint import edit_json

torch.set_num_threads(1)
hf.register()


# --- damage


def flip_byte(path):
    """Changes one byte in the middle and keeps the size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = {
    "no directory": (lambda d: shutil.rmtree(d), "no such directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "it has no config.json"),
    "config cut": (lambda d: truncate(d / "config.json"), "config.json is not valid JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "does not hold a JSON object"),
    "plain model": (
        lambda d: edit_json(d / "config.json", lambda c: c.pop("quantization_config")),
        "names no libortho quantization",
    ),
    "newer config": (
        lambda d: edit_json(
            d / "config.json", lambda c: c["quantization_config"].update(format_version=FORMAT_VERSION + 1)
        ),
        f"written by a newer lm-ortho .format {FORMAT_VERSION + 1}, this one reads up to {FORMAT_VERSION}.; upgrade",
    ),
    "newer manifest": (
        lambda d: edit_json(d / "manifest.json", lambda c: c.update(format_version=7)),
        "written by a newer lm-ortho",
    ),
    "other bits": (
        lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(bits="4")),
        "bits='4'; expected one of 3, 4, 8, 16",
    ),
    "no group": (
        lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(group_size=0)),
        "group_size=0; expected a positive multiple of 8",
    ),
    "no modules": (
        lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(modules=[])),
        "lists no decomposed modules",
    ),
    "no version": (
        lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].pop("format_version")),
        "no valid format_version",
    ),
    "changed config": (
        lambda d: edit_json(d / "config.json", lambda c: c.update(rms_norm_eps=0.5)),
        "config.json",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest cut": (lambda d: truncate(d / "manifest.json"), "manifest.json is not valid JSON"),
    "foreign manifest": (lambda d: (d / "manifest.json").write_text("{}"), "does not describe"),
    "manifest without files": (
        lambda d: edit_json(d / "manifest.json", lambda c: c.pop("files")),
        "manifest.json is damaged",
    ),
    "manifest that points outside": (
        lambda d: edit_json(d / "manifest.json", lambda c: c["files"].update({"../x": c["files"]["config.json"]})),
        "manifest.json is damaged",
    ),
    "no base": (lambda d: (d / "base.safetensors").unlink(), "base.safetensors is missing"),
    "base cut": (lambda d: truncate(d / "base.safetensors"), "base.safetensors has .* bytes, not .*truncated"),
    "base changed": (
        lambda d: flip_byte(d / "base.safetensors"),
        "base.safetensors was changed after it was written",
    ),
    "ortho cut": (lambda d: truncate(d / "ortho.safetensors"), "ortho.safetensors has .* truncated or replaced"),
    "ortho changed": (lambda d: flip_byte(d / "ortho.safetensors"), "ortho.safetensors was changed"),
    "no index": (lambda d: (d / "model.safetensors.index.json").unlink(), "index.json is missing"),
    "tokenizer changed": (lambda d: flip_byte(d / "tokenizer.json"), "tokenizer.json was changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line(kind, directory):
    damage, message = DAMAGE[kind]
    damage(directory)
    with pytest.raises(UserError, match=message) as error_info:
        load(directory)
    assert "\n" not in str(error_info.value)
    assert str(directory) in str(error_info.value)


@pytest.mark.parametrize("name", ["base.safetensors", "ortho.safetensors"])
def test_from_pretrained_checks_the_weights(directory, name):
    flip_byte(directory / name)
    with pytest.raises(UserError, match=rf"{name} was changed"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("load_function", [load, AutoModelForCausalLM.from_pretrained])
def test_the_streams_of_two_decompositions_cannot_be_combined(directory, tmp_path, load_function):
    other = save(tmp_path / "other", tiny.patched_model(tiny.llama(seed=2)))
    shutil.copy(other / "ortho.safetensors", directory)
    with pytest.raises(UserError, match=r"ortho\.safetensors (was changed|has .* truncated or replaced)") as error_info:
        load_function(directory)
    assert "\n" not in str(error_info.value)


@pytest.mark.parametrize("load_function", [load, AutoModelForCausalLM.from_pretrained])
def test_a_missing_shard_is_one_clear_line(tmp_path, load_function):
    path = save(tmp_path / "sharded", tiny.patched_model(), shard_bytes=20_000)
    shard = sorted(path.glob("base-*"))[1]
    shard.unlink()
    with pytest.raises((UserError, OSError), match=shard.name) as error_info:
        load_function(path)
    assert "\n" not in str(error_info.value)


def rewrite_manifest(directory):
    """Writes a manifest that agrees with the files, as if the damage came before the hashes were computed."""
    meta = read_meta(directory)
    write_manifest(directory, meta)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.scales", "model.norm.weight"])
def test_a_base_that_lacks_a_tensor_is_refused(directory, name):
    base = load_file(directory / "base.safetensors")
    base.pop(name)
    save_file(base, directory / "base.safetensors", metadata={"format": "pt"})
    edit_json(directory / "model.safetensors.index.json", lambda c: c["weight_map"].pop(name))
    rewrite_manifest(directory)
    with pytest.raises(UserError, match=f"lacks {name}"):
        load(directory)


def test_an_ortho_file_of_another_model_is_refused(directory):
    ortho = load_file(directory / "ortho.safetensors")
    ortho["model.layers.0.mlp.up_proj.ortho_cols"] += 1000
    save_file(ortho, directory / "ortho.safetensors")
    rewrite_manifest(directory)
    with pytest.raises(UserError, match=r"ortho\.safetensors does not fit the base"):
        load(directory)


def test_modules_that_the_model_does_not_have(directory):
    edit_json(directory / "config.json", lambda c: c["quantization_config"]["modules"].append("model.norm"))
    rewrite_manifest(directory)
    with pytest.raises(UserError, match=r"decomposes 'model\.norm'"):
        load(directory)


def test_a_model_type_that_transformers_does_not_know(directory):
    edit_json(directory / "config.json", lambda c: c.update(model_type="alien"))
    rewrite_manifest(directory)
    with pytest.raises(UserError, match="transformers cannot load it") as error_info:
        load(directory)
    assert "\n" not in str(error_info.value)


def test_is_checkpoint(saved_checkpoint, tmp_path):
    assert is_checkpoint(saved_checkpoint[1])
    assert is_checkpoint(str(saved_checkpoint[1]))
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "nothing")
    assert not is_checkpoint("someone/model")
    tiny.llama().save_pretrained(tmp_path / "plain")
    assert not is_checkpoint(tmp_path / "plain")
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        read_meta(tmp_path / "plain")


# --- models that cannot be saved, and the files after a failure


def test_models_that_cannot_be_saved(tmp_path):
    target = tmp_path / "checkpoint"
    with pytest.raises(UserError, match="not decomposed"):
        save(target, tiny.llama())
    with pytest.raises(UserError, match="plain JSON"):
        save(target, tiny.patched_model(), meta={"loss": float("nan")})
    with pytest.raises(UserError, match="plain JSON"):
        save(target, tiny.patched_model(), meta={"tensor": torch.zeros(1)})
    model = tiny.llama()
    streams = tiny.model_streams(model)
    first = next(iter(streams))
    other_lattice = tiny.layer_streams(model.get_submodule(first).weight.detach(), bits=8)
    patch(model, {**streams, first: other_lattice})
    with pytest.raises(UserError, match="share bits and group_size"):
        save(target, model)
    plain = torch.nn.Sequential(torch.nn.Linear(8, 8)).requires_grad_(False)
    patch(plain, {"0": tiny.layer_streams(plain[0].weight, group_size=8)})
    with pytest.raises(UserError, match="no config"):
        save(target, plain)
    assert list(tmp_path.iterdir()) == []  # no incomplete file is left


def test_a_failure_while_writing_leaves_the_old_checkpoint(directory, monkeypatch):
    before = {entry.name: entry.read_bytes() for entry in directory.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(write, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        save(directory, tiny.patched_model(tiny.llama(seed=2)))
    assert {entry.name: entry.read_bytes() for entry in directory.iterdir()} == before
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]


def test_an_interruption_between_the_files_is_refused_by_load(directory, monkeypatch):
    (directory / "notes.txt").write_text("mine")  # so that files are moved one by one
    targets = []

    def stop(source, target):
        if len(targets) == 2:
            raise KeyboardInterrupt
        targets.append(target)
        shutil.move(source, target)

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(directory, tiny.patched_model(tiny.llama(seed=2)))
    with pytest.raises(UserError, match=r"manifest\.json is missing; the checkpoint is incomplete"):
        load(directory)
    assert (directory / "notes.txt").read_text() == "mine"


def test_an_older_checkpoint_is_replaced(directory):
    (directory / ".last_used").touch()
    model = tiny.patched_model(tiny.llama(seed=2), with_ortho=False)
    save(directory, model)
    assert torch.equal(tiny.logits_at(load(directory), 0.0), tiny.logits_at(model, 0.0))
    assert not (directory / "ortho.safetensors").exists()
    assert (directory / "tokenizer.json").exists(), "as with any model, a tokenizer stays until another is saved"


def test_unrelated_files_stay(directory):
    (directory / ".git").mkdir()
    for name in ("notes.txt", ".gitattributes", ".git/HEAD"):
        (directory / name).write_text("mine")
    model = tiny.patched_model(tiny.llama(seed=2), with_ortho=False)
    save(directory, model)
    for name in ("notes.txt", ".gitattributes", ".git/HEAD"):
        assert (directory / name).read_text() == "mine"
    assert not (directory / "ortho.safetensors").exists()  # it would not fit the new base
    assert torch.equal(tiny.logits_at(load(directory), 0.0), tiny.logits_at(model, 0.0))


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", tiny.patched_model())
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").is_file()
    assert {entry.name for entry in tmp_path.iterdir()} == {"link", "real"}


def test_another_model_is_not_overwritten(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"holds another model \(model.safetensors\)"):
        save(tmp_path / "plain", tiny.patched_model())
    tiny.llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    with pytest.raises(UserError, match=r"holds another model \(model-00001-of-"):
        save(tmp_path / "sharded", tiny.patched_model())
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "config")
    with pytest.raises(UserError, match=r"holds another model \(config.json\)"):
        save(tmp_path / "config", tiny.patched_model())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        save(tmp_path / "file", tiny.patched_model())
