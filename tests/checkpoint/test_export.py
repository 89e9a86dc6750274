"""``lm-ortho export``: plain models for other libraries, with exactly the weights of the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTNeoXConfig
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from lm_ortho.checkpoint import ORTHO_FILE, save
from lm_ortho.checkpoint.export import _check_plain, export, pack_base_stream
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear, get_streams, patch
from lm_ortho.streams import BaseStream, code_range
from tests.support import tiny
from tests.support.checkpoint import tokenizer
from tests.support.harness import make_model
from tests.support.paths import REPOSITORY

torch.set_num_threads(1)


def make_with_biases() -> torch.nn.Module:
    """A model with biases in every layer and a head that is not named ``lm_head``."""
    return tiny.from_config(
        GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=128,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )


def make_tied() -> torch.nn.Module:
    """A model whose head is the embedding."""
    return make_model(128)


def make_partial() -> torch.nn.Module:
    """A model in which only the layers of the MLP are decomposed."""
    model = tiny.llama(intermediate_size=128)
    linears = find_linear(model, "mlp.*")
    patch(model, {name: tiny.layer_streams(linear.weight.detach(), group_size=32) for name, linear in linears.items()})
    return model


def make_patched(make: Any, **lattice: Any) -> torch.nn.Module:
    return tiny.patched_model(make(), **{"group_size": 16, **lattice})


def load_plain(directory: Path, **options: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


# ---------------------------------------------------------------- bf16


@pytest.mark.parametrize("make", [tiny.llama, make_tied, make_with_biases])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_bf16_weights_are_those_of_the_streams(make: Any, alpha: float, tmp_path: Path) -> None:
    model = make_patched(make)
    result = export(save(tmp_path / "checkpoint", model, tokenizer()), tmp_path / "out", alpha)
    exported_model = load_plain(tmp_path / "out")
    for name, layer in get_streams(model).items():
        assert torch.equal(exported_model.get_submodule(name).weight, layer.to_dense(alpha, torch.bfloat16))
        assert layer.bias is None or torch.equal(exported_model.get_submodule(name).bias, layer.bias)
    state = model.state_dict()
    for name, tensor in exported_model.state_dict().items():
        if name in state and name.rpartition(".")[0] not in get_streams(model):
            assert torch.equal(tensor.float(), state[name].float()), name
    logits, expected_logits = (
        tiny.logits(load_plain(tmp_path / "out", dtype=torch.float32)),
        tiny.logits_at(model, alpha),
    )
    torch.testing.assert_close(logits, expected_logits, rtol=2e-2, atol=2e-2 * float(expected_logits.abs().max()))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    assert result.layers == len(get_streams(model))
    assert result.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


STOCK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
AutoTokenizer.from_pretrained(sys.argv[1])
package_modules = {"lm_ortho.checkpoint", "lm_ortho.layer", "lm_ortho.streams"} & set(sys.modules)
print(len(package_modules), sum(map(len, report.values())), model.dtype)
"""


def test_plain_transformers_reads_the_output_of_the_command(saved_checkpoint: Any, tmp_path: Path) -> None:
    """Runs the command as a user does, and loads its output without lm-ortho."""
    code = "from lm_ortho.plugin import startup; startup.install(force=True)\nfrom lm_ortho.cli import main; main()"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, "export", "--alpha", "1"]
    result = subprocess.run(
        [*command, str(saved_checkpoint[1]), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out'}: bf16, alpha=1, 14 layers, ")
    assert "holds the memory in clear" in result.stdout
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    loading_process = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "out")],
        env=environment | {"LM_ORTHO_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert loading_process.stdout.split() == ["0", "0", "torch.bfloat16"], loading_process.stderr


# ---------------------------------------------------------------- compressed-tensors


@pytest.mark.parametrize(
    ("make", "lattice"),
    [
        (tiny.llama, {"bits": 4}),
        (tiny.llama, {"bits": 8, "group_size": 32}),
        (make_tied, {"bits": 4}),
        (make_with_biases, {"bits": 4, "group_size": 32}),
        (make_with_biases, {"bits": 8}),
    ],
)
def test_packed_weights_are_the_base_stream_bit_for_bit(make: Any, lattice: dict[str, Any], tmp_path: Path) -> None:
    model = make_patched(make, **lattice)
    export(save(tmp_path / "checkpoint", model, tokenizer()), tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out" / ORTHO_FILE).exists()
    expected_logits = tiny.logits_at(model, 0.0)
    for options in ({}, {"dtype": torch.float32}):
        exported_model = load_plain(tmp_path / "out", **options)
        logits = tiny.logits(exported_model)  # the first call unpacks
        for name, layer in get_streams(model).items():
            weight = exported_model.get_submodule(name).weight
            assert torch.equal(weight, layer.base.dequantise(weight.dtype))
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)  # the logits of float32


def test_packed_models_can_be_unpacked_at_load(tmp_path: Path) -> None:
    model = make_patched(tiny.llama)
    export(save(tmp_path / "checkpoint", model), tmp_path / "out", format="compressed-tensors")
    with pytest.warns(UserWarning, match="quantization_config"):
        exported_model = load_plain(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    for name, layer in get_streams(model).items():
        assert torch.equal(exported_model.get_submodule(name).weight, layer.to_dense(0.0, torch.bfloat16))


def test_layers_without_streams_are_not_packed(tmp_path: Path) -> None:
    model = make_partial()
    export(save(tmp_path / "checkpoint", model), tmp_path / "out", format="compressed-tensors")
    ignored_names = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored_names
    assert "model.layers.1.self_attn.q_proj" in ignored_names
    assert not any("mlp" in name for name in ignored_names)
    logits = tiny.logits(load_plain(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(logits, tiny.logits_at(model, 0.0), rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([4, 8]), groups=st.integers(1, 5), rows=st.integers(1, 6))
def test_the_packing_is_that_of_the_package(seed: int, bits: int, groups: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (rows, 8 * groups), generator=generator).to(torch.int8)
    stream = BaseStream.from_codes(codes, torch.ones(rows, groups), bits, 8)
    tensors = pack_base_stream(stream)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, torch.Size(tensors["weight_shape"])), codes)


def test_a_stream_without_codes_is_not_packed() -> None:
    with pytest.raises(ValueError, match="no codes"):
        pack_base_stream(BaseStream.from_weight(torch.ones(8, 8)))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("lattice", "options", "message"),
    [
        (
            {},
            {"alpha": 0.5, "format": "compressed-tensors"},
            r"alpha=0\.5: format=compressed-tensors holds only the base",
        ),
        ({"bits": 3}, {"format": "compressed-tensors"}, "a base stream of 3 bits; 4 or 8 can be exported"),
        ({"bits": 16}, {"format": "compressed-tensors"}, "a base stream of 16 bits; 4 or 8 can be exported"),
        ({}, {"format": "compressed-tensors"}, "down_proj has 96 columns, no multiple of the group of 64"),
        ({}, {"format": "gguf"}, "format='gguf' is unknown; known: bf16, compressed-tensors"),
        ({}, {"alpha": 2}, "alpha=2 must be a number between 0"),
    ],
)
def test_models_that_a_format_cannot_hold(
    lattice: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path / "checkpoint", tiny.patched_model(**lattice))
    with pytest.raises(UserError, match=message) as error_info:
        export(tmp_path / "checkpoint", tmp_path / "out", **options)
    assert "\n" not in str(error_info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_layers_that_are_no_nn_linear_are_refused() -> None:
    holder = torch.nn.ModuleDict({"layer": Conv1D(64, 64)})
    with pytest.raises(UserError, match=r"layer is a Conv1D, not an nn\.Linear"):
        _check_plain(holder, {"layer": tiny.layer_streams(torch.ones(64, 64))})


def test_directories_that_cannot_be_used(saved_checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    for source, out, message in (
        (saved_checkpoint[1], tmp_path, r"holds mine\.txt"),
        (saved_checkpoint[1], saved_checkpoint[1], r"holds base\.safetensors"),
        (tmp_path / "nowhere", tmp_path / "out", "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            export(source, out)


def test_a_base_only_checkpoint_gives_alpha_zero_alone(saved_checkpoint: Any, directory: Path, tmp_path: Path) -> None:
    (directory / ORTHO_FILE).unlink()
    with pytest.raises(UserError, match="holds only the base stream, so only alpha=0 can be exported"):
        export(directory, tmp_path / "out", 1.0)
    export(directory, tmp_path / "out", 0.0)
    export(saved_checkpoint[1], tmp_path / "complete", 0.0)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "complete" / name).read_bytes()


@pytest.mark.parametrize("format", ["bf16", "compressed-tensors"])
def test_nothing_is_left_of_a_failure(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "checkpoint", make_patched(tiny.llama))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lm_ortho.checkpoint.export._copy_remaining_files", fail)
    with pytest.raises(UserError, match=r"out='.*' cannot be written \(No space left on device\)"):
        export(tmp_path / "checkpoint", tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_json(saved_checkpoint: Any, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(saved_checkpoint[1]), str(tmp_path / "out"), "--json"])
    report = json.loads(result.stdout)
    assert (report["format"], report["alpha"], report["layers"]) == ("bf16", 0.0, 14)
    shutil.rmtree(tmp_path / "out")
