"""Checkpoints: what goes in comes out, and damage is told in one line."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lm_ortho.checkpoint import attach, hf, is_checkpoint, load, read_meta, save, write
from lm_ortho.checkpoint.manifest import sha256
from lm_ortho.errors import UserError
from lm_ortho.layer import (
    alpha_scope,
    find_linear,
    get_alpha,
    ortho_layers,
    patch,
    set_alpha,
    streams_of,
    unpatch,
)
from lm_ortho.streams import bits_per_weight, density

torch.set_num_threads(1)
hf.register()

META = {"recipe": {"density": 0.05, "sieve": "attribution"}, "report": {"steps": [1, 2], "note": "ü"}}


def tokenizer():
    vocabulary = {f"w{i}": i for i in range(128)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A patched model and its checkpoint; the directory is only read."""
    model = tiny.patched()
    return model, save(tmp_path_factory.mktemp("made") / "checkpoint", model, tokenizer(), META)


@pytest.fixture
def directory(made, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(made[1], tmp_path / "checkpoint")


def say(model, alpha):
    with alpha_scope(alpha):
        return tiny.logits(model)


def assert_same_model(one, other, alphas=(0.0, 0.5, 1.0)):
    for alpha in alphas:
        assert torch.equal(say(one, alpha), say(other, alpha))


# --- what is written


def test_files_and_names(made):
    model, path = made
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
    assert {name.rpartition(".")[0] for name in ortho} == set(streams_of(model))
    assert base["model.embed_tokens.weight"].dtype == base["lm_head.weight"].dtype == torch.bfloat16
    layer = "model.layers.0.mlp.up_proj"
    assert base[f"{layer}.qweight"].dtype == torch.uint8
    assert base[f"{layer}.scales"].dtype == ortho[f"{layer}.ortho_vals"].dtype == torch.bfloat16
    assert ortho[f"{layer}.ortho_rowptr"].dtype == ortho[f"{layer}.ortho_cols"].dtype == torch.int32


def test_config_and_manifest(made):
    model, path = made
    config = json.loads((path / "config.json").read_text())
    settings_of_model = config["quantization_config"]
    streams = streams_of(model)
    assert settings_of_model["quant_method"] == "libortho"
    assert (settings_of_model["bits"], settings_of_model["group_size"]) == (4, 64)
    assert settings_of_model["modules"] == list(streams)
    assert settings_of_model["density"] == density(streams)
    assert settings_of_model["bits_per_weight"] == bits_per_weight(streams)
    assert settings_of_model["recipe"] == META["recipe"]
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {entry.name for entry in path.iterdir()} - {"manifest.json"}
    for name, record in manifest["files"].items():
        assert record == {"sha256": sha256(path / name), "bytes": (path / name).stat().st_size}
    assert read_meta(path) == META


def test_bits_per_weight_is_what_lies_on_disk(made):
    """HISTORY 18: storage was once claimed, not counted."""
    model, path = made
    on_disk = 0
    for name in ("base.safetensors", "ortho.safetensors"):
        for key, tensor in load_file(path / name).items():
            if key.rpartition(".")[0] in ortho_layers(model):
                on_disk += tensor.nbytes
    weights = sum(layer.in_features * layer.out_features for layer in ortho_layers(model).values())
    assert bits_per_weight(streams_of(model)) == 8 * on_disk / weights


def test_the_same_model_gives_the_same_bytes(made, tmp_path):
    again = save(tmp_path / "again", tiny.patched(), tokenizer(), META)
    for entry in made[1].iterdir():
        assert entry.read_bytes() == (again / entry.name).read_bytes(), entry.name


# --- what is read back


def test_round_trip(made):
    model, path = made
    loaded = load(path)
    assert_same_model(model, loaded)
    assert get_alpha(loaded) == 0.0
    assert not loaded.training
    assert loaded.lm_head.weight.dtype == torch.float32
    for name, streams in streams_of(model).items():
        for part, tensor in streams.tensors().items():
            assert torch.equal(streams_of(loaded)[name].tensors()[part], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, None])
def test_round_trip_in_other_dtypes(made, dtype):
    loaded = load(made[1], dtype=dtype)
    assert loaded.lm_head.weight.dtype == (dtype or torch.bfloat16)
    layer = next(iter(ortho_layers(loaded).values()))
    assert (layer.qweight.dtype, layer.scales.dtype, layer.ortho_vals.dtype) == (
        torch.uint8, torch.bfloat16, torch.bfloat16,
    )  # fmt: skip
    assert (layer.ortho_rowptr.dtype, layer.ortho_cols.dtype) == (torch.int32, torch.int32)
    if dtype == torch.float64:
        torch.testing.assert_close(say(loaded, 1.0).float(), say(made[0], 1.0), rtol=1e-3, atol=1e-4)
    assert_same_model(made[0], loaded.to(torch.float32))


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([3, 4, 8, 16]),
    st.sampled_from([8, 40, 64]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_round_trip_of_every_kind(tmp_path_factory, bits, group_size, share, bias, tied):
    model = tiny.llama(attention_bias=bias, tie_word_embeddings=tied, num_hidden_layers=1, intermediate_size=72)
    for linear in find_linear(model).values():
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    tiny.in_bf16_values(model)
    tiny.patched(model, bits=bits, group_size=group_size, density=share)
    path = save(tmp_path_factory.mktemp("kind") / "checkpoint", model)
    loaded = load(path)
    assert_same_model(model, loaded)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert read_meta(path) == {}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=128,
        ),
        GPTNeoXConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=128
        ),
        OPTConfig(
            hidden_size=32, ffn_dim=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=128,
            word_embed_proj_dim=32, max_position_embeddings=64,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_architectures(config, tmp_path):
    model = tiny.patched(tiny.from_config(config))
    assert_same_model(model, load(save(tmp_path / "checkpoint", model)))


def test_shards(made, tmp_path):
    model = made[0]
    path = save(tmp_path / "sharded", model, shard_bytes=20_000)
    shards = sorted(path.glob("base-*.safetensors"))
    assert len(shards) > 1
    assert not (path / "base.safetensors").exists()
    assert_same_model(model, load(path))
    shards[0].unlink()
    with pytest.raises(UserError, match=f"{shards[0].name} is missing"):
        load(path)


def test_a_moved_checkpoint_is_still_one(made, tmp_path, monkeypatch):
    moved = shutil.copytree(made[1], tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a")
    assert_same_model(made[0], load("b"))
    assert is_checkpoint("b")
    assert moved.exists()


# --- base only


def test_without_the_ortho_file_only_alpha_zero(made, directory):
    """HISTORY 13: alpha=0 once loaded both streams."""
    (directory / "ortho.safetensors").unlink()
    loaded = load(directory)
    assert torch.equal(say(loaded, 0.0), say(made[0], 0.0))
    with pytest.raises(UserError, match="alpha=1: this model has only its base stream"):
        set_alpha(loaded, 1)
    with pytest.raises(UserError, match="only its base stream"):
        say(loaded, [0.0, 0.5, 0.0])
    assert not any("ortho" in name for name in loaded.state_dict())
    again = load(save(directory.parent / "again", loaded))
    assert torch.equal(say(again, 0.0), say(made[0], 0.0))
    assert not (directory.parent / "again" / "ortho.safetensors").exists()


# --- transformers


def test_from_pretrained_and_save_pretrained(made, tmp_path):
    model, path = made
    loaded, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert type(loaded) is LlamaForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(model, loaded)
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    assert read_meta(tmp_path / "saved") == META
    for again in (
        load(tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32),
    ):
        assert_same_model(model, again)
    assert (tmp_path / "saved" / "base.safetensors").read_bytes() == (path / "base.safetensors").read_bytes()
    assert (tmp_path / "saved" / "ortho.safetensors").read_bytes() == (path / "ortho.safetensors").read_bytes()


def test_the_default_dtype_of_from_pretrained(made):
    assert AutoModelForCausalLM.from_pretrained(made[1]).dtype == torch.bfloat16


def test_save_pretrained_of_a_fresh_model(tmp_path):
    model = tiny.patched()
    attach(model, META)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("base-*"))) > 1
    assert read_meta(tmp_path / "saved") == META
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32))
    with pytest.raises(UserError, match="state_dict"):
        model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())
    with pytest.raises(UserError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "other", max_shard_size="many")
    with pytest.raises(UserError, match=r"model\.save_pretrained"):
        type(model).save_pretrained(model, tmp_path / "other")
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    assert not (tmp_path / "elsewhere").exists()


def test_push_to_hub_uploads_our_files(made, tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return self

        repo_id = "someone/model"

    class Card:
        def save(self, path):
            pass

    uploaded = {}

    def upload(self, folder, repo_id, **kwargs):
        uploaded.update(dict.fromkeys(os.listdir(folder), repo_id))

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(LlamaForCausalLM, "_upload_modified_files", upload)
    model = load(made[1])
    wanted = {entry.name for entry in made[1].iterdir() if "token" not in entry.name}
    model.push_to_hub("model")
    assert set(uploaded) == wanted
    uploaded.clear()
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="model", variant=None)
    assert set(uploaded) == wanted
    assert is_checkpoint(tmp_path / "local")


def test_a_copy_of_a_loaded_model_saves_itself(made, tmp_path):
    loaded = load(made[1])
    twin = copy.deepcopy(loaded)
    twin.lm_head.weight.data.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert not say(load(tmp_path / "twin"), 1.0).any()
    assert say(loaded, 1.0).any()


def test_dequantize_and_unpatch_make_a_plain_model(made, tmp_path):
    for alpha, make in ((1.0, lambda m: m.dequantize()), (0.5, lambda m: unpatch(m, 0.5))):
        loaded = load(made[1])
        make(loaded)
        assert not ortho_layers(loaded)
        loaded.save_pretrained(tmp_path / f"plain-{alpha}")
        assert not is_checkpoint(tmp_path / f"plain-{alpha}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"plain-{alpha}", dtype=torch.float32)
        torch.testing.assert_close(tiny.logits(again), say(made[0], alpha), rtol=1e-2, atol=1e-2)


def test_register_twice():
    hf.register()
    hf.register()


LEAN = """
import sys
import lm_ortho.kernels, lm_ortho.layer, lm_ortho.streams
heavy = {"transformers", "lm_eval", "pydantic", "safetensors", "datasets"}
print(*heavy & set(sys.modules))
import lm_ortho.checkpoint
print(*{"transformers", "lm_eval"} & set(sys.modules))
from lm_ortho.plugin import startup
startup.install(force=True)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_lean_rooms_and_the_start_up_hook(made):
    """The layer needs torch only; the hook registers us while transformers is half imported."""
    run = subprocess.run([sys.executable, "-c", LEAN, made[1]], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["", "", "OrthoLinear"]


def test_from_pretrained_checks_the_weights(directory):
    flip(directory / "ortho.safetensors")
    with pytest.raises(UserError, match=r"ortho\.safetensors was changed"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def hub_cache(made, root, files):
    """A hub cache as huggingface_hub lays it out, with these files of the checkpoint."""
    repository = root / "models--someone--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name in files:
        shutil.copy(made[1] / name, snapshot / name)
    return snapshot


def test_hub_repository(made, tmp_path, offline):
    files = [entry.name for entry in made[1].iterdir()]
    hub_cache(made, tmp_path, files)
    loaded = AutoModelForCausalLM.from_pretrained(
        "someone/model", cache_dir=tmp_path, local_files_only=True, dtype=torch.float32
    )
    assert_same_model(made[0], loaded)
    assert loaded.hf_quantizer.meta == META


def test_hub_repository_whose_ortho_file_is_fetched(made, tmp_path, monkeypatch, offline):
    """The index lists no ortho tensor, so transformers leaves that file on the hub; we ask for it."""
    beside = {"config.json", "base.safetensors", "model.safetensors.index.json", "generation_config.json"}
    snapshot = hub_cache(made, tmp_path, beside)
    asked = []

    def cached_file(source, name, **kwargs):
        asked.append((source, name, kwargs["revision"], kwargs["cache_dir"]))
        return str(shutil.copy(made[1] / name, snapshot / name))

    monkeypatch.setattr(sys.modules["transformers.utils"], "cached_file", cached_file)
    loaded = AutoModelForCausalLM.from_pretrained(
        "someone/model", cache_dir=tmp_path, local_files_only=True, dtype=torch.float32
    )
    assert_same_model(made[0], loaded)
    wanted = ["ortho.safetensors", "manifest.json"]
    assert asked == [("someone/model", name, "a" * 40, tmp_path) for name in wanted]


# --- damage


def flip(path):
    """Changes one byte in the middle, the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE = {
    "no directory": (lambda d: shutil.rmtree(d), "no such directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "it has no config.json"),
    "config cut": (lambda d: cut(d / "config.json"), "config.json is not valid JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "does not hold a JSON object"),
    "plain model": (
        lambda d: edit_json(d / "config.json", lambda c: c.pop("quantization_config")),
        "names no libortho quantization",
    ),
    "newer config": (
        lambda d: edit_json(d / "config.json", lambda c: c["quantization_config"].update(format_version=2)),
        "written by a newer lm-ortho .format 2, this one reads up to 1.; upgrade",
    ),
    "newer manifest": (
        lambda d: edit_json(d / "manifest.json", lambda c: c.update(format_version=7)),
        "written by a newer lm-ortho",
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
    "manifest cut": (lambda d: cut(d / "manifest.json"), "manifest.json is not valid JSON"),
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
    "base cut": (lambda d: cut(d / "base.safetensors"), "base.safetensors has .* bytes, not .*truncated"),
    "base changed": (
        lambda d: flip(d / "base.safetensors"),
        "base.safetensors was changed after it was written",
    ),
    "ortho cut": (lambda d: cut(d / "ortho.safetensors"), "ortho.safetensors has .* truncated or replaced"),
    "ortho changed": (lambda d: flip(d / "ortho.safetensors"), "ortho.safetensors was changed"),
    "no index": (lambda d: (d / "model.safetensors.index.json").unlink(), "index.json is missing"),
    "tokenizer changed": (lambda d: flip(d / "tokenizer.json"), "tokenizer.json was changed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line(kind, directory):
    damage, message = DAMAGE[kind]
    damage(directory)
    with pytest.raises(UserError, match=message) as caught:
        load(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def resign(directory):
    """A manifest that agrees with what lies there: damage from before the hashes were taken."""
    meta = read_meta(directory)
    write.write_manifest(directory, meta)


def test_a_base_that_lacks_a_tensor_is_refused(directory):
    base = load_file(directory / "base.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    base.pop(name)
    save_file(base, directory / "base.safetensors", metadata={"format": "pt"})
    edit_json(directory / "model.safetensors.index.json", lambda c: c["weight_map"].pop(name))
    resign(directory)
    with pytest.raises(UserError, match=f"lacks {name}"):
        load(directory)


def test_an_ortho_file_of_another_model_is_refused(directory):
    ortho = load_file(directory / "ortho.safetensors")
    ortho["model.layers.0.mlp.up_proj.ortho_cols"] += 1000
    save_file(ortho, directory / "ortho.safetensors")
    resign(directory)
    with pytest.raises(UserError, match=r"ortho\.safetensors does not fit the base"):
        load(directory)


def test_modules_that_the_model_does_not_have(directory):
    edit_json(directory / "config.json", lambda c: c["quantization_config"]["modules"].append("model.norm"))
    resign(directory)
    with pytest.raises(UserError, match=r"decomposes 'model\.norm'"):
        load(directory)


def test_a_model_type_that_transformers_does_not_know(directory):
    edit_json(directory / "config.json", lambda c: c.update(model_type="alien"))
    resign(directory)
    with pytest.raises(UserError, match="transformers cannot load it") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


def test_is_checkpoint(made, tmp_path):
    assert is_checkpoint(made[1])
    assert is_checkpoint(str(made[1]))
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "nothing")
    assert not is_checkpoint("someone/model")
    tiny.llama().save_pretrained(tmp_path / "plain")
    assert not is_checkpoint(tmp_path / "plain")
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        read_meta(tmp_path / "plain")


# --- what cannot be saved, and what a failure leaves


def test_what_cannot_be_saved(tmp_path):
    target = tmp_path / "checkpoint"
    with pytest.raises(UserError, match="not decomposed"):
        save(target, tiny.llama())
    with pytest.raises(UserError, match="plain JSON"):
        save(target, tiny.patched(), meta={"loss": float("nan")})
    with pytest.raises(UserError, match="plain JSON"):
        save(target, tiny.patched(), meta={"tensor": torch.zeros(1)})
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
    assert list(tmp_path.iterdir()) == []  # nothing left half-written


def test_a_failure_while_writing_leaves_the_old_checkpoint(directory, monkeypatch, made):
    before = {entry.name: entry.read_bytes() for entry in directory.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(write, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        save(directory, tiny.patched(tiny.llama(seed=2)))
    assert {entry.name: entry.read_bytes() for entry in directory.iterdir()} == before
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]


def test_an_interruption_between_the_files_is_refused_by_load(directory, monkeypatch):
    (directory / "notes.txt").write_text("mine")  # so that files are moved one by one
    moved = []

    def stop(source, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(target)
        shutil.move(source, target)

    monkeypatch.setattr(write.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(directory, tiny.patched(tiny.llama(seed=2)))
    with pytest.raises(UserError, match=r"manifest\.json is missing; the checkpoint is incomplete"):
        load(directory)
    assert (directory / "notes.txt").read_text() == "mine"


def test_an_older_checkpoint_is_replaced(directory):
    (directory / ".last_used").touch()
    model = tiny.patched(tiny.llama(seed=2), with_ortho=False)
    save(directory, model)
    assert torch.equal(say(load(directory), 0.0), say(model, 0.0))
    assert not (directory / "ortho.safetensors").exists()
    assert not (directory / "tokenizer.json").exists()


def test_files_of_others_stay(directory):
    (directory / "notes.txt").write_text("mine")
    model = tiny.patched(tiny.llama(seed=2), with_ortho=False)
    save(directory, model)
    assert (directory / "notes.txt").read_text() == "mine"
    assert not (directory / "ortho.safetensors").exists()  # it would not fit the new base
    assert torch.equal(say(load(directory), 0.0), say(model, 0.0))


def test_another_model_is_not_overwritten(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"holds another model \(model.safetensors\)"):
        save(tmp_path / "plain", tiny.patched())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        save(tmp_path / "file", tiny.patched())


def test_the_file_is_readable_by_anyone_who_knows_safetensors(made):
    with safe_open(made[1] / "base.safetensors", framework="pt") as base:
        assert base.metadata() == {"format": "pt"}
