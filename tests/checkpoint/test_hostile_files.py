"""Files of a checkpoint that are none, and files that are too much, are refused before anything waits or is built."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_ortho.checkpoint import limits, load
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.input_files import read_json
from lm_ortho.errors import UserError
from tests.support.changed_checkpoint import LAYER, edit_json, refuse, rewrite
from tests.support.checkpoint import assert_same_model

torch.set_num_threads(1)


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
