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


def test_from_pretrained_and_save_pretrained(saved_checkpoint, tmp_path):
    model, path = saved_checkpoint
    loaded_model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert type(loaded_model) is LlamaForCausalLM
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(model, loaded_model)
    loaded_model.save_pretrained(tmp_path / "saved")
    tokenizer().save_pretrained(tmp_path / "saved")
    assert read_meta(tmp_path / "saved") == META
    for again in (
        load(tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32),
    ):
        assert_same_model(model, again)
    assert (tmp_path / "saved" / "base.safetensors").read_bytes() == (path / "base.safetensors").read_bytes()
    assert (tmp_path / "saved" / "ortho.safetensors").read_bytes() == (path / "ortho.safetensors").read_bytes()


def test_the_default_dtype_of_from_pretrained(saved_checkpoint):
    assert AutoModelForCausalLM.from_pretrained(saved_checkpoint[1]).dtype == torch.bfloat16


def test_save_pretrained_of_a_fresh_model(tmp_path):
    model = tiny.patched_model()
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
        LlamaForCausalLM.save_pretrained(model, tmp_path / "other")
    model.save_pretrained(tmp_path / "second_process", is_main_process=False)
    assert not (tmp_path / "second_process").exists()


@pytest.fixture
def uploads(monkeypatch):
    """The names of the uploaded files, each with the repository."""

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return self

        repo_id = "someone/model"

    class Card:
        def save(self, path):
            pass

    uploaded_files = {}

    def upload(self, folder, repo_id, **kwargs):
        uploaded_files.update(dict.fromkeys(os.listdir(folder), repo_id))

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(LlamaForCausalLM, "_upload_modified_files", upload)
    return uploaded_files


def test_push_to_hub_uploads_the_files_of_the_checkpoint(saved_checkpoint, tmp_path, uploads):
    model = load(saved_checkpoint[1])
    expected_files = {entry.name for entry in saved_checkpoint[1].iterdir() if "token" not in entry.name}
    model.push_to_hub("model")
    assert set(uploads) == expected_files
    uploads.clear()
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="model", variant=None)
    assert set(uploads) == expected_files
    assert is_checkpoint(tmp_path / "local")
    assert set(uploads.values()) == {"someone/model"}


def test_a_base_only_model_is_pushed_without_the_memory(directory, uploads):
    (directory / "ortho.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(directory).push_to_hub("model")
    assert "base.safetensors" in uploads
    assert "ortho.safetensors" not in uploads


def test_a_copy_of_a_loaded_model_saves_itself(saved_checkpoint, tmp_path):
    loaded_model = load(saved_checkpoint[1])
    twin = copy.deepcopy(loaded_model)
    twin.lm_head.weight.data.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert not tiny.logits_at(load(tmp_path / "twin"), 1.0).any()
    assert tiny.logits_at(loaded_model, 1.0).any()


def test_dequantize_and_unpatch_make_a_plain_model(saved_checkpoint, tmp_path):
    for alpha, make_plain in ((1.0, lambda m: m.dequantize()), (0.5, lambda m: unpatch(m, 0.5))):
        loaded_model = load(saved_checkpoint[1])
        make_plain(loaded_model)
        assert not ortho_layers(loaded_model)
        loaded_model.save_pretrained(tmp_path / f"plain-{alpha}")
        assert not is_checkpoint(tmp_path / f"plain-{alpha}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"plain-{alpha}", dtype=torch.float32)
        torch.testing.assert_close(tiny.logits(again), tiny.logits_at(saved_checkpoint[0], alpha), rtol=1e-2, atol=1e-2)


def test_register_twice():
    hf.register()
    hf.register()


LIGHT_IMPORTS = """
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


def test_light_imports_and_the_start_up_hook(saved_checkpoint):
    """The layer needs torch only; the hook registers the quantiser while transformers is being imported."""
    process = subprocess.run(
        [sys.executable, "-c", LIGHT_IMPORTS, saved_checkpoint[1]], capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == ["", "", "OrthoLinear"]


@pytest.fixture
def offline_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_hub_cache(saved_checkpoint, root, files):
    """Writes a hub cache in the layout of huggingface_hub, with these files of the checkpoint."""
    repository = root / "models--someone--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name in files:
        shutil.copy(saved_checkpoint[1] / name, snapshot / name)
    return snapshot


def test_hub_repository(saved_checkpoint, tmp_path, offline_hub):
    files = [entry.name for entry in saved_checkpoint[1].iterdir()]
    write_hub_cache(saved_checkpoint, tmp_path, files)
    loaded_model = AutoModelForCausalLM.from_pretrained(
        "someone/model", cache_dir=tmp_path, local_files_only=True, dtype=torch.float32
    )
    assert_same_model(saved_checkpoint[0], loaded_model)
    assert loaded_model.hf_quantizer.meta == META


def test_hub_repository_whose_ortho_file_is_fetched(saved_checkpoint, tmp_path, monkeypatch, offline_hub):
    """The index lists no ortho tensor, so transformers does not fetch that file; the quantiser does."""
    present_files = {"config.json", "base.safetensors", "model.safetensors.index.json", "generation_config.json"}
    snapshot = write_hub_cache(saved_checkpoint, tmp_path, present_files)
    requests = []

    def cached_file(source, name, **kwargs):
        requests.append((source, name, kwargs["revision"], kwargs["cache_dir"]))
        return str(shutil.copy(saved_checkpoint[1] / name, snapshot / name))

    monkeypatch.setattr(sys.modules["transformers.utils"], "cached_file", cached_file)
    loaded_model = AutoModelForCausalLM.from_pretrained(
        "someone/model", cache_dir=tmp_path, local_files_only=True, dtype=torch.float32
    )
    assert_same_model(saved_checkpoint[0], loaded_model)
    missing_files = ["ortho.safetensors", "manifest.json"]
    assert requests == [("someone/model", name, "a" * 40, tmp_path) for name in missing_files]
