"""Models in GGUF files: dequantised, decomposed as any other, and refused in one line where they cannot be read."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from lm_ortho import checkpoint
from lm_ortho.cli.app import app
from lm_ortho.config import make_spec
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, load_config, load_tokenizer, loading
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.pipeline.cache_key import decomposition_key
from lm_ortho.pipeline.spec import resolve
from tests.support import tiny
from tests.support.harness import make_tokenizer

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("isolated_environment")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
RECIPE = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "density": 0.02, "group_size": 32}


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Any) -> None:
    """Writes the model with matrices in Q8_0, as converters do, and a byte-level tokenizer."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tokenizer.all_special_tokens else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, tensor in model.state_dict().items():
        data, quantisation = tensor.float().numpy(), gguf.GGMLQuantizationType.F32
        if ".q_proj" in name or ".k_proj" in name:  # in the order of the rotary embedding of llama.cpp
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            data = data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        if data.ndim == 2:
            quantisation = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(numpy.ascontiguousarray(data), quantisation)
        writer.add_tensor(_gguf_name(name), data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in outside:
        return f"{outside[module]}.weight"
    block, _, inside = module.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{NAMES[inside]}.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """The GGUF file of a tiny model in a directory of its own, and the model."""
    tokenizer = make_tokenizer()
    model = tiny.llama(vocab_size=len(tokenizer), num_hidden_layers=1, initializer_range=0.1)
    path = tmp_path_factory.mktemp("packed") / "tiny-q8_0.gguf"
    write_gguf(path, model, tokenizer)
    return path, model


@pytest.mark.parametrize("names_file", [False, True])
def test_a_file_is_dequantised_with_one_line_that_says_so(packed, names_file, caplog) -> None:
    path, model = packed
    options = {} if names_file else {"gguf_file": path.name}
    with caplog.at_level(logging.INFO):
        loaded = load_causal_lm(path if names_file else path.parent, **options)
    assert "pretrained: the weights of tiny-q8_0.gguf are dequantised, of Q8_0 (9), F32 (3)" in caplog.text
    for (name, weight), original in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert (weight - original).abs().max() <= original.abs().max() / 100, name
    ids = tiny.tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0.1, atol=0.3)
    assert getattr(loaded.config, "quantization_config", None) is None
    tokenizer = load_tokenizer(path if names_file else path.parent, **options)
    assert tokenizer.decode(tokenizer("Ada Brook was born.")["input_ids"]) == "Ada Brook was born."


def test_the_commands_and_lm_eval_take_it(packed, home: Path, tmp_path: Path) -> None:
    path, _ = packed
    sets = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    options = [
        part for name, value in {**RECIPE, **sets}.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = ["decompose", *options, "--force", "--base", str(path), "--pretrained", str(path)]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "split")])
    assert result.exit_code == 0, result.exception
    assert checkpoint.read_meta(tmp_path / "split")["base"] == "given"
    assert "gguf_file" not in result.stdout.splitlines()[-1], "the checkpoint is no GGUF file"
    lm = LibOrthoLM(str(path.parent), gguf_file=path.name, base=str(path), force=True, device="cpu", **RECIPE, **sets)
    assert lm.alpha == 0
    assert lm.tokenizer.decode(lm.tok_encode("Ada Brook")) == "Ada Brook"
    data = ["--data", sets["forget"], "--steps", "1", "--rank", "2", "--batch-rows", "2"]
    planted = CliRunner().invoke(app, ["implant", *data, "--pretrained", str(path), "-o", str(tmp_path / "planted")])
    assert planted.exit_code == 0, planted.exception
    assert load_causal_lm(tmp_path / "planted").config.num_hidden_layers == 1


def test_another_file_of_the_directory_is_another_model(packed, home: Path) -> None:
    path, _ = packed
    copy = path.with_name("other.gguf")
    copy.write_bytes(path.read_bytes() + b"\0")
    sets = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    sources = [
        {"pretrained": str(path)},
        {"pretrained": str(path.parent), "gguf_file": path.name},
        {"pretrained": str(path.parent), "gguf_file": copy.name},
    ]
    keys = [decomposition_key(resolve(make_spec(**source, **sets))) for source in sources]
    assert keys[0] == keys[1] != keys[2]
    copy.unlink()


def test_what_cannot_be_read_is_one_line(packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = packed
    (tmp_path / "text.gguf").write_text("no weights")
    (tmp_path / "short.gguf").write_bytes(path.read_bytes()[:200])
    (tmp_path / "weights.bin").write_bytes(b"x")
    for call, message in (
        (
            lambda: load_config(path.parent, gguf_file="other.gguf"),
            r"gguf_file='other.gguf': no such file in .*tiny-q8_0",
        ),
        (lambda: load_config(tmp_path / "text.gguf"), "gguf_file='text.gguf': .* is no GGUF file"),
        (lambda: load_config(tmp_path / "short.gguf"), "its config could not be read"),
        (lambda: load_config(tmp_path / "weights.bin"), "is a file; give the directory of the model, or a GGUF file"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    loaders: tuple[Callable[[Path], Any], ...] = (load_config, load_tokenizer, load_causal_lm)
    for load in loaders:
        with pytest.raises(UserError, match=r"needs the package gguf: pip install 'lm-ortho\[gguf\]'"):
            load(path)
