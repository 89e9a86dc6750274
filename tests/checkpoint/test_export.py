"""``lm-ortho export``: plain models that others read, weight for weight those of the checkpoint."""

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
from lm_ortho.checkpoint.export import _check_plain, export, packed
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear, get_streams, patch
from lm_ortho.streams import BaseStream, code_range
from tests.support import tiny
from tests.support.checkpoint import tokenizer
from tests.support.harness import make_model
from tests.support.paths import REPOSITORY

torch.set_num_threads(1)


def with_biases() -> torch.nn.Module:
    """Biases in every layer, and a head that is no `lm_head`."""
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


def tied() -> torch.nn.Module:
    """The head is the embedding."""
    return make_model(128)


def partly() -> torch.nn.Module:
    """Only the layers of the MLP are decomposed."""
    model = tiny.llama(intermediate_size=128)
    chosen = find_linear(model, "mlp.*")
    patch(model, {name: tiny.layer_streams(linear.weight.detach(), group_size=32) for name, linear in chosen.items()})
    return model


def patched(make: Any, **lattice: Any) -> torch.nn.Module:
    return tiny.patched(make(), **{"group_size": 16, **lattice})


def plain(directory: Path, **options: Any) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


# ---------------------------------------------------------------- bf16


@pytest.mark.parametrize("make", [tiny.llama, tied, with_biases])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_bf16_weights_are_those_of_the_streams(make: Any, alpha: float, tmp_path: Path) -> None:
    model = patched(make)
    done = export(save(tmp_path / "made", model, tokenizer()), tmp_path / "out", alpha)
    read = plain(tmp_path / "out")
    for name, layer in get_streams(model).items():
        assert torch.equal(read.get_submodule(name).weight, layer.dense(alpha, torch.bfloat16))
        assert layer.bias is None or torch.equal(read.get_submodule(name).bias, layer.bias)
    stored = model.state_dict()
    for name, tensor in read.state_dict().items():
        if name in stored and name.rpartition(".")[0] not in get_streams(model):
            assert torch.equal(tensor.float(), stored[name].float()), name
    said, expected = tiny.logits(plain(tmp_path / "out", dtype=torch.float32)), tiny.logits_at(model, alpha)
    torch.testing.assert_close(said, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    assert done.layers == len(get_streams(model))
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


STOCK = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
AutoTokenizer.from_pretrained(sys.argv[1])
ours = {"lm_ortho.checkpoint", "lm_ortho.layer", "lm_ortho.streams"} & set(sys.modules)
print(len(ours), sum(map(len, report.values())), model.dtype)
"""


def test_the_command_writes_what_stock_transformers_reads(made: Any, tmp_path: Path) -> None:
    """The command as typed, and a reader that never heard of lm-ortho."""
    hooked = "from lm_ortho.plugin import startup; startup.install(force=True)\nfrom lm_ortho.cli import main; main()"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", hooked, "export", "--alpha", "1"]
    done = subprocess.run(
        [*command, str(made[1]), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: bf16, alpha=1, 14 layers, ")
    assert "holds the memory in clear" in done.stdout
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    read = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "out")],
        env=environment | {"LM_ORTHO_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert read.stdout.split() == ["0", "0", "torch.bfloat16"], read.stderr


# ---------------------------------------------------------------- compressed-tensors


@pytest.mark.parametrize(
    ("make", "lattice"),
    [
        (tiny.llama, {"bits": 4}),
        (tiny.llama, {"bits": 8, "group_size": 32}),
        (tied, {"bits": 4}),
        (with_biases, {"bits": 4, "group_size": 32}),
        (with_biases, {"bits": 8}),
    ],
)
def test_packed_weights_are_the_base_stream_bit_for_bit(make: Any, lattice: dict[str, Any], tmp_path: Path) -> None:
    model = patched(make, **lattice)
    export(save(tmp_path / "made", model, tokenizer()), tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out" / ORTHO_FILE).exists()
    expected = tiny.logits_at(model, 0.0)
    for options in ({}, {"dtype": torch.float32}):
        read = plain(tmp_path / "out", **options)
        said = tiny.logits(read)  # the first call unpacks
        for name, layer in get_streams(model).items():
            weight = read.get_submodule(name).weight
            assert torch.equal(weight, layer.base.dequantize(weight.dtype))
    torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-4)  # those of float32


def test_packed_models_can_be_unpacked_at_load(made: Any, tmp_path: Path) -> None:
    model = patched(tiny.llama)
    export(save(tmp_path / "made", model), tmp_path / "out", format="compressed-tensors")
    with pytest.warns(UserWarning, match="quantization_config"):
        read = plain(tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True))
    for name, layer in get_streams(model).items():
        assert torch.equal(read.get_submodule(name).weight, layer.dense(0.0, torch.bfloat16))


def test_layers_that_were_left_alone_are_not_packed(tmp_path: Path) -> None:
    model = partly()
    export(save(tmp_path / "made", model), tmp_path / "out", format="compressed-tensors")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored
    assert "model.layers.1.self_attn.q_proj" in ignored
    assert not any("mlp" in name for name in ignored)
    said = tiny.logits(plain(tmp_path / "out", dtype=torch.float32))
    torch.testing.assert_close(said, tiny.logits_at(model, 0.0), rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), bits=st.sampled_from([4, 8]), groups=st.integers(1, 5), rows=st.integers(1, 6))
def test_the_packing_is_that_of_the_package(seed: int, bits: int, groups: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits)
    codes = torch.randint(low, high + 1, (rows, 8 * groups), generator=generator).to(torch.int8)
    stream = BaseStream.from_codes(codes, torch.ones(rows, groups), bits, 8)
    mine = packed(stream)
    assert torch.equal(mine["weight_packed"], pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(mine["weight_packed"], bits, torch.Size(mine["weight_shape"])), codes)


def test_a_stream_without_codes_is_not_packed() -> None:
    with pytest.raises(ValueError, match="no codes"):
        packed(BaseStream.from_weight(torch.ones(8, 8)))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("lattice", "options", "message"),
    [
        ({}, {"alpha": 0.5, "format": "compressed-tensors"}, r"alpha=0\.5: format=compressed-tensors holds the base"),
        ({"bits": 3}, {"format": "compressed-tensors"}, "a base stream of 3 bits; 4 or 8 can be exported"),
        ({"bits": 16}, {"format": "compressed-tensors"}, "a base stream of 16 bits; 4 or 8 can be exported"),
        ({}, {"format": "compressed-tensors"}, "down_proj has 96 columns, no multiple of the group of 64"),
        ({}, {"format": "gguf"}, "format='gguf' is unknown; known: bf16, compressed-tensors"),
        ({}, {"alpha": 2}, "alpha=2 must be a number between 0"),
    ],
)
def test_what_a_format_cannot_hold(
    lattice: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(tmp_path / "made", tiny.patched(**lattice))
    with pytest.raises(UserError, match=message) as caught:
        export(tmp_path / "made", tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_layers_that_the_format_would_not_find() -> None:
    holder = torch.nn.ModuleDict({"layer": Conv1D(64, 64)})
    with pytest.raises(UserError, match=r"layer is a Conv1D, not an nn\.Linear"):
        _check_plain(holder, {"layer": tiny.layer_streams(torch.ones(64, 64))})


def test_places_that_cannot_be_used(made: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    for source, out, message in (
        (made[1], tmp_path, r"holds mine\.txt"),
        (made[1], made[1], r"holds base\.safetensors"),
        (tmp_path / "nowhere", tmp_path / "out", "no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            export(source, out)


def test_a_base_only_checkpoint_gives_alpha_zero_alone(made: Any, directory: Path, tmp_path: Path) -> None:
    (directory / ORTHO_FILE).unlink()
    with pytest.raises(UserError, match="holds only the base stream, so alpha=0 is all it can give"):
        export(directory, tmp_path / "out", 1.0)
    export(directory, tmp_path / "out", 0.0)
    export(made[1], tmp_path / "whole", 0.0)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("format", ["bf16", "compressed-tensors"])
def test_nothing_is_left_of_a_failure(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "made", patched(tiny.llama))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lm_ortho.checkpoint.export._copy_rest", fail)
    with pytest.raises(UserError, match=r"out='.*' cannot be written \(No space left on device\)"):
        export(tmp_path / "made", tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_json(made: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(made[1]), str(tmp_path / "out"), "--json"])
    report = json.loads(done.stdout)
    assert (report["format"], report["alpha"], report["layers"]) == ("bf16", 0.0, 14)
    shutil.rmtree(tmp_path / "out")
