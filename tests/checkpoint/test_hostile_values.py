"""Configurations, manifests and indices with values of other kinds are refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_ortho.checkpoint import load
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.manifest import write_manifest
from tests.support.changed_checkpoint import edit_json, refuse, rewrite
from tests.support.checkpoint import assert_same_model

torch.set_num_threads(1)


CONFIG_VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a text for a size": lambda c: c.update(hidden_size="64"),
    "heads that do not divide": lambda c: c.update(num_attention_heads=7),
    "no heads": lambda c: c.update(num_attention_heads=0),
    "a negative size": lambda c: c.update(intermediate_size=-96),
    "an unknown activation": lambda c: c.update(hidden_act="\x1b[31m"),
    "an unknown model": lambda c: c.update(model_type="\ud800"),
    "a list as a model": lambda c: c.update(model_type=["llama"]),
    "no model": lambda c: c.pop("model_type"),
    "rope": lambda c: c.update(rope_scaling={"rope_type": "no such", "factor": 1e999}),
    "rope parameters": lambda c: c.update(rope_parameters=[1]),
    "layer types": lambda c: c.update(layer_types=["x"] * 3),
    "another number of layers": lambda c: c.update(num_hidden_layers=3),
    "a method": lambda c: c.update(to_dict=1),
    "modules as text": lambda c: c["quantization_config"].update(modules="model"),
    "modules as numbers": lambda c: c["quantization_config"].update(modules=[1, None]),
    "modules that are no layers": lambda c: c["quantization_config"].update(modules=["model", "model.config", ""]),
    "a module of a surrogate": lambda c: c["quantization_config"].update(modules=["\ud800"]),
    "memories as a number": lambda c: c["quantization_config"].update(memories=5),
    "memories as numbers": lambda c: c["quantization_config"].update(memories=[5]),
    "density": lambda c: c["quantization_config"].update(density=float("nan")),
    "a huge density": lambda c: c["quantization_config"].update(density=10**400),
    "bits as a float": lambda c: c["quantization_config"].update(bits=4.0),
    "a version as a bool": lambda c: c["quantization_config"].update(format_version=True),
    "a version of many digits": lambda c: c["quantization_config"].update(format_version="@"),
    "settings as a list": lambda c: c.update(quantization_config=["libortho"]),
}


@pytest.mark.parametrize("kind", CONFIG_VALUES)
def test_config_values_that_cannot_be(directory, kind):
    config = json.loads((directory / "config.json").read_text())
    CONFIG_VALUES[kind](config)
    (directory / "config.json").write_text(json.dumps(config).replace('"@"', "9" * 5000))  # json writes no such number
    rewrite(directory)
    refuse(load, directory, str(directory))
    refuse(read_contents, directory, str(directory))


@pytest.mark.parametrize("name", ["to_dict", "self", "__class__", "quant_method", "dequantize"])
def test_settings_that_shadow_a_method_are_dropped(saved_checkpoint, directory, name):
    value = "libortho" if name == "quant_method" else 1
    edit_json(directory / "config.json", lambda c: c["quantization_config"].update({name: value}))
    rewrite(directory)
    assert_same_model(saved_checkpoint[0], load(directory))
    assert_same_model(saved_checkpoint[0], AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "files as a list": lambda m: m.update(files=[1]),
    "no meta": lambda m: m.update(meta=None),
    "a record as text": lambda m: m["files"].update({"config.json": "x"}),
    "no hash": lambda m: m["files"]["config.json"].pop("sha256"),
    "a hash of another kind": lambda m: m["files"]["config.json"].update(sha256=1),
    "a negative size": lambda m: m["files"]["config.json"].update(bytes=-1),
    "a size as text": lambda m: m["files"]["config.json"].update(bytes="1567"),
    "an infinite size": lambda m: m["files"]["config.json"].update(bytes=1e999),
    "a dot": lambda m: m["files"].update({"./config.json": m["files"]["config.json"]}),
    "an empty name": lambda m: m["files"].update({"": m["files"]["config.json"]}),
    "a root": lambda m: m["files"].update({"/etc/passwd": m["files"]["config.json"]}),
    "a way up": lambda m: m["files"].update({"a/../../x": m["files"]["config.json"]}),
    "a long name": lambda m: m["files"].update({"x" * 10**6: m["files"]["config.json"]}),
    "a name with a zero": lambda m: m["files"].update({"a\0b": m["files"]["config.json"]}),
    "a surrogate": lambda m: m["files"].update({"\ud800": m["files"]["config.json"]}),
    "an escape sequence": lambda m: m["files"].update({"\x1b]0;x\x07": m["files"]["config.json"]}),
    "too many files": lambda m: m["files"].update({f"{i}": m["files"]["config.json"] for i in range(10_001)}),
    "a version as a list": lambda m: m.update(format_version=[1]),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_that_cannot_be(directory, kind):
    edit_json(directory / "manifest.json", MANIFESTS[kind])
    refuse(load, directory, str(directory))


@pytest.mark.parametrize(
    "weight_map", [[], {}, None, {"a": 5}, {"a": None}, {"a": ["base.safetensors"]}, {"a": "../base.safetensors"}]
)
def test_an_index_that_is_no_table_of_files(directory, weight_map):
    edit_json(directory / "model.safetensors.index.json", lambda index: index.update(weight_map=weight_map))
    rewrite(directory)
    refuse(load, directory, str(directory))


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"[]", b"\xef\xbb\xbf", b"{" * 3, b"nan", b"9" * 5000])
@pytest.mark.parametrize("name", ["config.json", "manifest.json", "model.safetensors.index.json"])
def test_bytes_that_are_no_json(directory, name, content):
    (directory / name).write_bytes(content)
    if name != "manifest.json":
        shutil.copy(directory / name, directory.parent / name)
        edit_json(directory / "manifest.json", lambda m: m["files"].pop(name))
        content = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").unlink()
        write_manifest(directory, content["meta"])
    refuse(load, directory, name)
