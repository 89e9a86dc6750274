"""Changes of a saved checkpoint whose manifest agrees with them, and the refusals that are expected.

``rewrite`` makes the manifest agree with whatever was changed, as whoever publishes a checkpoint can.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lm_ortho.checkpoint import hf, load, read_meta
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.export import export
from lm_ortho.checkpoint.manifest import write_manifest
from lm_ortho.errors import UserError

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
