"""Checkpoints through transformers: from_pretrained, save_pretrained, the hub, and the start-up hook."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lm_ortho.checkpoint import attach, hf, is_checkpoint, load, read_meta
from lm_ortho.errors import UserError
from lm_ortho.layer import ortho_layers, unpatch
from tests.support import tiny
from tests.support.checkpoint import META, assert_same_model, tokenizer

torch.set_num_threads(1)
hf.register()


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


@pytest.fixture
def uploaded(monkeypatch):
    """The files that a model would have uploaded, with the repository they would have gone to."""

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return self

        repo_id = "someone/model"

    class Card:
        def save(self, path):
            pass

    seen = {}

    def upload(self, folder, repo_id, **kwargs):
        seen.update(dict.fromkeys(os.listdir(folder), repo_id))

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(LlamaForCausalLM, "_upload_modified_files", upload)
    return seen


def test_push_to_hub_uploads_our_files(made, tmp_path, uploaded):
    model = load(made[1])
    wanted = {entry.name for entry in made[1].iterdir() if "token" not in entry.name}
    model.push_to_hub("model")
    assert set(uploaded) == wanted
    uploaded.clear()
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="model", variant=None)
    assert set(uploaded) == wanted
    assert is_checkpoint(tmp_path / "local")
    assert set(uploaded.values()) == {"someone/model"}


def test_a_base_only_model_is_pushed_without_the_memory(directory, uploaded):
    (directory / "ortho.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(directory).push_to_hub("model")
    assert "base.safetensors" in uploaded
    assert "ortho.safetensors" not in uploaded


def test_a_copy_of_a_loaded_model_saves_itself(made, tmp_path):
    loaded = load(made[1])
    twin = copy.deepcopy(loaded)
    twin.lm_head.weight.data.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert not tiny.logits_at(load(tmp_path / "twin"), 1.0).any()
    assert tiny.logits_at(loaded, 1.0).any()


def test_dequantize_and_unpatch_make_a_plain_model(made, tmp_path):
    for alpha, make in ((1.0, lambda m: m.dequantize()), (0.5, lambda m: unpatch(m, 0.5))):
        loaded = load(made[1])
        make(loaded)
        assert not ortho_layers(loaded)
        loaded.save_pretrained(tmp_path / f"plain-{alpha}")
        assert not is_checkpoint(tmp_path / f"plain-{alpha}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"plain-{alpha}", dtype=torch.float32)
        torch.testing.assert_close(tiny.logits(again), tiny.logits_at(made[0], alpha), rtol=1e-2, atol=1e-2)


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
