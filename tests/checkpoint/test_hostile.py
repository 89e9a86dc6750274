"""Checkpoints whose manifest agrees with weights that lie: every way in refuses them, and none reads another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from lm_ortho.checkpoint import load, save
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.settings import check_sizes
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.layer import patch
from lm_ortho.streams import LayerStreams, OrthoStream
from tests.support import tiny
from tests.support.changed_checkpoint import LAYER, edit_json, edit_tensors, every_reader, readers, refuse, rewrite
from tests.support.checkpoint import assert_same_model

torch.set_num_threads(1)


# --- tensors

TENSORS = {
    "row pointers that wrap around": (
        "ortho",
        "ortho_rowptr",
        lambda t: torch.cat([torch.tensor([0, 2**63 - 1, -2]), torch.full((len(t) - 3,), int(t[-1]))]),
        "rowptr must rise",
    ),
    "a column of another layer": ("ortho", "ortho_cols", lambda t: t + 1000, "cols lie outside"),
    "a negative column": ("ortho", "ortho_cols", lambda t: t - 100, "cols lie outside"),
    "columns of 64 bits": ("ortho", "ortho_cols", lambda t: t.long(), "cols must be int32"),
    "infinite values": ("ortho", "ortho_vals", lambda t: t * float("inf"), "vals holds a value that is not finite"),
    "scales of one byte": ("base", "scales", lambda t: t.to(torch.uint8), "scales must be torch.bfloat16"),
    "scales in float32": ("base", "scales", lambda t: t.float(), "scales must be torch.bfloat16"),
    "a NaN scale": ("base", "scales", lambda t: t * float("nan"), "scales holds a value that is not finite"),
    "codes of another width": ("base", "qweight", lambda t: t[:, :-4].contiguous(), "qweight must be torch.uint8"),
    "codes with a sign": ("base", "qweight", lambda t: t.view(torch.int8), "qweight must be torch.uint8"),
    "scales without elements": ("base", "scales", lambda t: t[:0], "scales must be torch.bfloat16"),
}


@readers
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit(directory, kind, read):
    file, part, change, message = TENSORS[kind]
    name = f"{LAYER}.{part}"
    edit_tensors(directory, f"{file}.safetensors", lambda tensors: tensors.update({name: change(tensors[name])}))
    refuse(read, directory, message, LAYER)


@readers
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda t: t * float("nan"), "model.norm.weight holds a value that is not finite"),
        ("model.embed_tokens.weight", lambda t: t[:5].clone(), "model.embed_tokens.weight must be"),
        ("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn), "F8_E4M3, which is not used"),
        ("model.norm.weight", lambda t: t.int(), "model.norm.weight must be"),
    ],
)
def test_tensors_outside_the_streams(directory, name, change, message, read):
    edit_tensors(directory, "base.safetensors", lambda tensors: tensors.update({name: change(tensors[name])}))
    refuse(read, directory, "base.safetensors", message)


@readers
def test_a_tensor_that_the_model_does_not_have(directory, read):
    edit_tensors(directory, "base.safetensors", lambda tensors: tensors.update({f"{LAYER}.weight": torch.ones(3)}))
    refuse(read, directory, "base.safetensors", f"{LAYER}.weight, which the model does not have")


@readers
def test_a_bias_that_is_not_finite(tmp_path, read):
    model = tiny.patched_model(tiny.llama(attention_bias=True))
    directory = save(tmp_path / "checkpoint", model)
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(directory, "base.safetensors", lambda tensors: tensors[name].fill_(float("-inf")))
    refuse(read, directory, "base.safetensors", name, "not finite")


@readers
def test_memories_that_hold_the_same_weight(tmp_path, read):
    model = tiny.llama()
    streams = tiny.model_streams(model)
    everywhere = {
        name: OrthoStream.from_dense(torch.ones(layer.shape), torch.ones(layer.shape, dtype=torch.bool))
        for name, layer in streams.items()
    }
    patch(
        model,
        {
            name: LayerStreams(layer.base, None, None, {"alice": layer.ortho, "bob": OrthoStream.empty(layer.shape)})
            for name, layer in streams.items()
        },
    )
    directory = save(tmp_path / "checkpoint", model)
    parts = {f"{name}.{part}": t for name, ortho in everywhere.items() for part, t in ortho.tensors().items()}
    save_file(parts, directory / "ortho-bob.safetensors")
    rewrite(directory)
    refuse(read, directory, "two memories hold the same position: alice and bob")


@readers
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_a_lattice_that_disagrees_with_the_tensors(directory, bits, read):
    edit_json(directory / "config.json", lambda c: c["quantization_config"].update(bits=bits))
    rewrite(directory)
    refuse(read, directory, "base.safetensors" if bits != 16 else "weight")


@pytest.mark.parametrize("file", ["base.safetensors", "ortho.safetensors"])
def test_cut_files_with_a_right_hash(directory, file):
    (directory / file).write_bytes((directory / file).read_bytes()[:500])
    rewrite(directory)
    refuse(load, directory, file, "truncated or not a safetensors file")
    refuse(read_contents, directory, file, "truncated or not a safetensors file")


# --- other weights beside a sound checkpoint


def other_model() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tiny.llama().state_dict().items()}


OTHER_WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": lambda d: save_file(other_model(), d / "model.safetensors", metadata={"format": "pt"}),
    "pytorch_model.bin": lambda d: torch.save(other_model(), d / "pytorch_model.bin"),
    "pytorch_model.bin.index.json": lambda d: (d / "pytorch_model.bin.index.json").write_text("{}"),
    "model-00001-of-00002.safetensors": lambda d: shutil.copy(
        d / "base.safetensors", d / "model-00001-of-00002.safetensors"
    ),
    "adapter_config.json": lambda d: (d / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(d)})
    ),
    "adapter_model.safetensors": lambda d: shutil.copy(d / "base.safetensors", d / "adapter_model.safetensors"),
    "generation_config.json": lambda d: edit_json(
        d / "manifest.json", lambda m: m["files"].pop("generation_config.json")
    ),
}


@every_reader
@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_weights_of_another_model_are_refused_by_name(directory, name, read):
    OTHER_WEIGHTS[name](directory)
    refuse(read, directory, name)
    if read == load and name != "generation_config.json":
        rewrite(directory)  # so they are if the manifest lists them
        refuse(read, directory, name)


@every_reader
def test_other_files_are_left_alone(saved_checkpoint, directory, read):
    (directory / "notes.txt").write_text("mine")
    (directory / "training_args.bin").write_bytes(b"\x80\x04.")
    (directory / "ortho-old.safetensors").write_bytes(b"")
    result = read(directory)
    if isinstance(result, torch.nn.Module) and result.dtype == torch.float32:
        assert_same_model(saved_checkpoint[0], result)


@every_reader
def test_weights_of_a_folder_inside(saved_checkpoint, directory, read):
    """Only the last part of such a name used to be compared with the manifest."""
    (directory / "sub").mkdir()
    save_file(other_model(), directory / "sub" / "base.safetensors", metadata={"format": "pt"})

    def point_elsewhere(index: Any) -> None:
        index["weight_map"] = dict.fromkeys(index["weight_map"], "sub/base.safetensors")

    edit_json(directory / "model.safetensors.index.json", point_elsewhere)
    for complete in (False, True):
        if complete:  # the folder is a checkpoint of its own, but the configuration above it is read
            shutil.copytree(saved_checkpoint[1], directory / "sub", dirs_exist_ok=True)
        else:
            rewrite(directory)
        refuse(read, directory, "sub")


def test_a_subfolder_can_be_named(saved_checkpoint, tmp_path):
    shutil.copytree(saved_checkpoint[1], tmp_path / "models" / "sub")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models", subfolder="sub", dtype=torch.float32)
    assert_same_model(saved_checkpoint[0], model)


def test_load_does_not_read_another_folder_than_it_verified(saved_checkpoint, directory):
    shutil.copytree(saved_checkpoint[1], directory / "sub")
    edit_json(directory / "sub" / "config.json", lambda c: c.update(rms_norm_eps=0.5))
    refuse(lambda path: load(path, subfolder="sub"), directory, "sub")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_from_pretrained_verifies_what_it_reads(directory, name):
    path = directory / name
    path.write_text(path.read_text() + "\n")
    refuse(AutoModelForCausalLM.from_pretrained, directory, f"{name} has")


@readers
@pytest.mark.parametrize(
    ("field", "value"),
    [("transformers_weights", "notes.safetensors"), ("attn_implementation", "kernels-community/flash-attn")],
)
def test_fields_that_name_other_weights_or_code(directory, field, value, read):
    edit_json(directory / "config.json", lambda c: c.update({field: value}))
    shutil.copy(directory / "base.safetensors", directory / "notes.safetensors")
    rewrite(directory)
    if read == AutoModelForCausalLM.from_pretrained and field == "attn_implementation":
        pytest.skip("transformers decides on this field before any quantiser is asked")
    refuse(read, directory, "notes.safetensors" if field == "transformers_weights" else field)


@pytest.mark.parametrize("name", ["modeling_llama.py", "custom_generate/generate.py"])
def test_unlisted_code_is_refused_where_code_may_run(saved_checkpoint, directory, name):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("raise SystemExit('ran')")
    assert_same_model(saved_checkpoint[0], load(directory))
    refuse(lambda path: load(path, trust_remote_code=True), directory, name)
    refuse(lambda path: read_contents(path, trust_remote_code=True), directory, name)


def test_load_without_a_directory():
    with pytest.raises(UserError, match=r'directory is missing: lm_ortho.load\("my/split"\)'):
        load()


def test_a_model_of_the_hub_is_loaded_by_transformers():
    with pytest.raises(UserError, match="a model of the hub is loaded by AutoModelForCausalLM"):
        load("someone/model")


def test_an_edited_tokenizer_is_refused_until_it_is_accepted(saved_checkpoint, directory):
    weights = json.loads((directory / "manifest.json").read_text())["files"]["base.safetensors"]
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_config\.json .*`lm-ortho inspect .* --accept-tokenizer`"):
        load(directory)
    result = CliRunner().invoke(app, ["inspect", str(directory), "--accept-tokenizer"])
    assert result.exit_code == 0
    assert "recorded as it is now: chat_template.jinja, tokenizer_config.json" in result.stderr
    assert_same_model(saved_checkpoint[0], load(directory))
    files = json.loads((directory / "manifest.json").read_text())["files"]
    assert files["base.safetensors"] == weights
    assert "chat_template.jinja" in files
    (directory / "base.safetensors").write_bytes(b"")
    assert CliRunner().invoke(app, ["inspect", str(directory), "--accept-tokenizer"]).exit_code == 1, (
        "weights never are"
    )


def test_the_limits_are_above_every_default_configuration_of_transformers() -> None:
    refused = {}
    for name, kind in CONFIG_MAPPING.items():
        try:
            config = json.loads(kind().to_json_string())
        except Exception:
            continue  # needs the configuration of a part, or another package
        try:
            check_sizes(config, name)
        except UserError as error:
            refused[name] = str(error)
    assert refused == {}
