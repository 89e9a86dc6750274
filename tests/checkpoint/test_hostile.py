"""Checkpoints whose manifest agrees with files that lie: every way in refuses them in one line, and none reads another.

``rewrite`` makes the manifest agree with whatever was changed, as whoever publishes a checkpoint can.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from lm_ortho.checkpoint import hf, limits, load, read_meta, save
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.export import export
from lm_ortho.checkpoint.input_files import read_json
from lm_ortho.checkpoint.manifest import write_manifest
from lm_ortho.checkpoint.settings import check_sizes
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.layer import patch
from lm_ortho.streams import LayerStreams, OrthoStream
from tests.support import tiny
from tests.support.checkpoint import assert_same_model

torch.set_num_threads(1)
hf.register()
LAYER = "model.layers.0.mlp.up_proj"
READERS: dict[str, Callable[[Path], Any]] = {
    "load": load,
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "inspect": read_contents,
    "export": lambda path: export(path, path.parent / "out"),
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
readers = pytest.mark.parametrize("read", list(READERS.values())[:3], ids=list(READERS)[:3])
"""Without export, which loads first."""


def rewrite(directory: Path) -> None:
    write_manifest(directory, read_meta(directory))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(directory: Path, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})
    rewrite(directory)


def refuse(read: Callable[[Path], Any], directory: Path, *parts: str) -> None:
    """Asserts that ``read`` raises one printable line that contains ``parts``."""
    with pytest.raises(UserError) as error_info:
        read(directory)
    message = str(error_info.value)
    assert message.isprintable()
    assert len(message) <= 2000
    for part in parts:
        assert part in message
    assert not (directory.parent / "out").exists()


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


# --- files that are none, and files that are too much


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def make_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 characters
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_pipe, make_device, make_socket, make_folder, make_circle])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "manifest.json",
        "base.safetensors",
        "ortho.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "generation_config.json",
    ],
)
def test_what_is_no_file_is_not_waited_for(directory, name, make):
    make(directory / name)
    refuse(load, directory, name)
    if name in ("manifest.json", "ortho.safetensors"):  # transformers opens the others, or says itself what is missing
        refuse(AutoModelForCausalLM.from_pretrained, directory, name)


def test_the_links_of_the_hub_cache_are_followed(saved_checkpoint, tmp_path):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--someone--model" / "blobs"
    shutil.copytree(saved_checkpoint[1], blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        path.rename(blobs / f"{path.name}-blob")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-blob")
    assert_same_model(saved_checkpoint[0], load(snapshot))
    assert_same_model(saved_checkpoint[0], AutoModelForCausalLM.from_pretrained(snapshot, dtype=torch.float32))
    read_contents(snapshot)


def nested(depth: int) -> Any:
    content: Any = {}
    for _ in range(depth):
        content = [content]
    return content


BOMBS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "layers": (lambda c: c.update(num_hidden_layers=10**7), "num_hidden_layers=10000000 is too large"),
    "no number of layers": (lambda c: c.update(num_hidden_layers=10**400), "num_hidden_layers="),
    "layers of a part": (lambda c: c.update(text_config={"n_layer": 10**9}), "n_layer=1000000000 is too large"),
    "experts": (lambda c: c.update(num_local_experts=10**8), "num_local_experts=100000000 is too large"),
    "vocabulary": (lambda c: c.update(vocab_size=2**60), "vocab_size=1152921504606846976 is too large"),
    "positions": (lambda c: c.update(max_position_embeddings=-(10**18)), "max_position_embeddings=-1000000000"),
    "a long module name": (
        lambda c: c["quantization_config"]["modules"].append("x" * 10**6),
        "modules holds 'xxxxx",
    ),
    "many memories": (
        lambda c: c["quantization_config"].update(memories=[f"m{i}" for i in range(5000)]),
        "memories holds 5000 names; at most 1000",
    ),
    "a module twice": (lambda c: c["quantization_config"]["modules"].append(LAYER), f"modules holds '{LAYER}' twice"),
    "deep JSON": (lambda c: c.update(deep=nested(90)), "more than 64 lists and objects inside each other"),
    "very deep JSON": (lambda c: c.update(deep="@"), "more than 64 lists and objects inside each other"),
    "group": (lambda c: c["quantization_config"].update(group_size=2**40), "group_size=1099511627776"),
    "a memory with a path": (
        lambda c: c["quantization_config"].update(memories=["../../x"]),
        "memories holds '../../x', which is no name of a memory",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_before_they_are_built(directory, kind):
    change, message = BOMBS[kind]
    config = directory / "config.json"
    edit_json(config, change)
    if kind == "very deep JSON":
        config.write_text(config.read_text().replace('"@"', "[" * 10**6 + "]" * 10**6))
    rewrite(directory)
    refuse(load, directory, message)


@pytest.mark.parametrize("kind", ["layers", "a long module name", "many memories", "group", "a memory with a path"])
def test_bombs_in_from_pretrained(directory, kind):
    change, message = BOMBS[kind]
    edit_json(directory / "config.json", change)
    rewrite(directory)
    refuse(AutoModelForCausalLM.from_pretrained, directory, message)


def test_large_json_is_not_read(directory):
    with (directory / "config.json").open("r+b") as stream:
        stream.truncate(limits.JSON_BYTES + 1)  # sparse: it takes no space
    rewrite(directory)
    refuse(load, directory, f"config.json has {limits.JSON_BYTES + 1} bytes; at most {limits.JSON_BYTES} are read")
    with pytest.raises(UserError, match="at most"):
        read_json(directory / "config.json")


def test_a_huge_file_is_not_hashed(directory):
    with (directory / "tokenizer.json").open("r+b") as stream:
        stream.truncate(limits.OTHER_FILE_BYTES + 1)
    edit_json(directory / "manifest.json", lambda m: m["files"]["tokenizer.json"].update(bytes=2**30 + 1))
    refuse(load, directory, "manifest.json lists 10737", "bytes in other files; at most 1073741824 are read")


def test_from_pretrained_does_not_wait_for_a_pipe(directory):
    """Without a dtype in the configuration, transformers opens the weights before it asks the quantiser."""
    edit_json(directory / "config.json", lambda c: c.pop("dtype"))
    rewrite(directory)
    make_pipe(directory / "base.safetensors")
    refuse(AutoModelForCausalLM.from_pretrained, directory, "base.safetensors is not a regular file")


def test_many_repeated_names_are_refused_at_once(directory):
    names = [f"m{index}" for index in range(200_000)]
    edit_json(directory / "config.json", lambda c: c["quantization_config"].update(modules=[*names, names[-1]]))
    rewrite(directory)
    refuse(load, directory, "modules holds 'm199999' twice")


def test_a_header_that_promises_more_than_there_is(directory):
    content = (directory / "base.safetensors").read_bytes()
    for length in (2**62, 2**63, 100_000_000, len(content)):
        (directory / "base.safetensors").write_bytes(length.to_bytes(8, "little") + content[8:])
        rewrite(directory)
        refuse(load, directory, "base.safetensors cannot be read")


# --- values of other kinds

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


# --- a way out


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
