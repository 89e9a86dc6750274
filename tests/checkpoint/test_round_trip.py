"""Checkpoints: which files are written, and that loading them gives the same model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, OPTConfig, Qwen2Config

from lm_ortho.checkpoint import hf, is_checkpoint, load, read_meta, save
from lm_ortho.checkpoint.input_files import sha256
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear, get_alpha, get_streams, ortho_layers, set_alpha
from lm_ortho.streams import bits_per_weight, density
from tests.support import tiny
from tests.support.checkpoint import META, assert_same_model, tokenizer

torch.set_num_threads(1)
hf.register()


# --- writing


def test_files_and_names(saved_checkpoint):
    model, path = saved_checkpoint
    names = {entry.name for entry in path.iterdir()}
    assert {"config.json", "base.safetensors", "ortho.safetensors", "model.safetensors.index.json"} <= names
    assert {"manifest.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert not [entry for entry in path.parent.iterdir() if ".tmp" in entry.name]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    base, ortho = load_file(path / "base.safetensors"), load_file(path / "ortho.safetensors")
    assert set(index["weight_map"]) == set(base)
    assert set(index["weight_map"].values()) == {"base.safetensors"}
    assert not [name for name in base if "ortho" in name]
    assert {name.rpartition(".")[2] for name in ortho} == {"ortho_rowptr", "ortho_cols", "ortho_vals"}
    assert {name.rpartition(".")[0] for name in ortho} == set(get_streams(model))
    assert base["model.embed_tokens.weight"].dtype == base["lm_head.weight"].dtype == torch.bfloat16
    layer = "model.layers.0.mlp.up_proj"
    assert base[f"{layer}.qweight"].dtype == torch.uint8
    assert base[f"{layer}.scales"].dtype == ortho[f"{layer}.ortho_vals"].dtype == torch.bfloat16
    assert ortho[f"{layer}.ortho_rowptr"].dtype == ortho[f"{layer}.ortho_cols"].dtype == torch.int32


def test_config_and_manifest(saved_checkpoint):
    model, path = saved_checkpoint
    config = json.loads((path / "config.json").read_text())
    quantization_config = config["quantization_config"]
    streams = get_streams(model)
    assert quantization_config["quant_method"] == "libortho"
    assert (quantization_config["bits"], quantization_config["group_size"]) == (4, 64)
    assert quantization_config["modules"] == list(streams)
    assert quantization_config["density"] == density(streams)
    assert quantization_config["bits_per_weight"] == bits_per_weight(streams)
    assert quantization_config["recipe"] == META["recipe"]
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {entry.name for entry in path.iterdir()} - {"manifest.json"}
    for name, record in manifest["files"].items():
        assert record == {"sha256": sha256(path / name), "bytes": (path / name).stat().st_size}
    assert read_meta(path) == META


def test_bits_per_weight_is_the_size_on_disk(saved_checkpoint):
    """HISTORY 18: storage was once claimed, not counted."""
    model, path = saved_checkpoint
    on_disk = 0
    for name in ("base.safetensors", "ortho.safetensors"):
        for key, tensor in load_file(path / name).items():
            if key.rpartition(".")[0] in ortho_layers(model):
                on_disk += tensor.nbytes
    weights = sum(layer.in_features * layer.out_features for layer in ortho_layers(model).values())
    assert bits_per_weight(get_streams(model)) == 8 * on_disk / weights


def test_the_same_model_gives_the_same_bytes(saved_checkpoint, tmp_path):
    again = save(tmp_path / "again", tiny.patched_model(), tokenizer(), META)
    for entry in saved_checkpoint[1].iterdir():
        assert entry.read_bytes() == (again / entry.name).read_bytes(), entry.name


def test_the_files_are_plain_safetensors(saved_checkpoint):
    with safe_open(saved_checkpoint[1] / "base.safetensors", framework="pt") as base:
        assert base.metadata() == {"format": "pt"}


# --- reading


def test_round_trip(saved_checkpoint):
    model, path = saved_checkpoint
    loaded_model = load(path)
    assert_same_model(model, loaded_model)
    assert get_alpha(loaded_model) == 0.0
    assert not loaded_model.training
    assert loaded_model.lm_head.weight.dtype == torch.float32
    for name, streams in get_streams(model).items():
        for part, tensor in streams.tensors().items():
            assert torch.equal(get_streams(loaded_model)[name].tensors()[part], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, None])
def test_round_trip_in_other_dtypes(saved_checkpoint, dtype):
    loaded_model = load(saved_checkpoint[1], dtype=dtype)
    assert loaded_model.lm_head.weight.dtype == (dtype or torch.bfloat16)
    layer = next(iter(ortho_layers(loaded_model).values()))
    assert layer.qweight.dtype == torch.uint8
    assert layer.scales.dtype == layer.ortho_vals.dtype == torch.bfloat16
    assert (layer.ortho_rowptr.dtype, layer.ortho_cols.dtype) == (torch.int32, torch.int32)
    if dtype == torch.float64:
        torch.testing.assert_close(
            tiny.logits_at(loaded_model, 1.0).float(), tiny.logits_at(saved_checkpoint[0], 1.0), rtol=1e-3, atol=1e-4
        )
    assert_same_model(saved_checkpoint[0], loaded_model.to(torch.float32))


@settings(max_examples=8)
@given(
    st.sampled_from([3, 4, 8, 16]),
    st.sampled_from([8, 40, 64]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_round_trip_of_every_kind(tmp_path_factory, bits, group_size, share, bias, is_tied):
    model = tiny.llama(attention_bias=bias, tie_word_embeddings=is_tied, num_hidden_layers=1, intermediate_size=72)
    for linear in find_linear(model).values():
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    tiny.round_to_bf16(model)
    tiny.patched_model(model, bits=bits, group_size=group_size, density=share)
    path = save(tmp_path_factory.mktemp("kind") / "checkpoint", model)
    loaded_model = load(path)
    assert_same_model(model, loaded_model)
    assert (loaded_model.lm_head.weight is loaded_model.model.embed_tokens.weight) == is_tied
    assert read_meta(path) == {}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=128,
        ),
        GPTNeoXConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=128),
        OPTConfig(
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=128,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config, tmp_path):
    model = tiny.patched_model(tiny.from_config(config))
    assert_same_model(model, load(save(tmp_path / "checkpoint", model)))


def test_shards(saved_checkpoint, tmp_path):
    model = saved_checkpoint[0]
    path = save(tmp_path / "sharded", model, shard_bytes=20_000)
    shards = sorted(path.glob("base-*.safetensors"))
    assert len(shards) > 1
    assert not (path / "base.safetensors").exists()
    assert_same_model(model, load(path))
    shards[0].unlink()
    with pytest.raises(UserError, match=f"{shards[0].name} is missing"):
        load(path)


def test_a_moved_checkpoint_loads(saved_checkpoint, tmp_path, monkeypatch):
    directory_copy = shutil.copytree(saved_checkpoint[1], tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    assert_same_model(saved_checkpoint[0], load("b"))
    assert is_checkpoint("b")
    assert directory_copy.exists()


# --- base only


def test_without_the_ortho_file_only_alpha_zero(saved_checkpoint, directory):
    """HISTORY 13: alpha=0 once loaded both streams."""
    (directory / "ortho.safetensors").unlink()
    loaded_model = load(directory)
    assert torch.equal(tiny.logits_at(loaded_model, 0.0), tiny.logits_at(saved_checkpoint[0], 0.0))
    with pytest.raises(UserError, match="alpha=1: this model has only its base stream"):
        set_alpha(loaded_model, 1)
    with pytest.raises(UserError, match="only its base stream"):
        tiny.logits_at(loaded_model, [0.0, 0.5, 0.0])
    assert not any("ortho" in name for name in loaded_model.state_dict())
    again = load(save(directory.parent / "again", loaded_model))
    assert torch.equal(tiny.logits_at(again, 0.0), tiny.logits_at(saved_checkpoint[0], 0.0))
    assert not (directory.parent / "again" / "ortho.safetensors").exists()
