"""``lm-ortho inspect``: what is counted from the files of a checkpoint, and where the memory sits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from lm_ortho import world
from lm_ortho.checkpoint import ORTHO_FILE, save
from lm_ortho.checkpoint.contents import LayerFacts, grid, read_contents
from lm_ortho.checkpoint.heat_map import heat_map, percent, shade
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.layer import get_streams
from lm_ortho.streams import bits_per_weight, density, stored_bytes
from tests.support import tiny

torch.set_num_threads(1)
runner = CliRunner()
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "lattice", [{"bits": 3}, {"bits": 4}, {"bits": 4, "group_size": 16}, {"bits": 8}, {"bits": 16}], ids=str
)
def test_facts_from_the_files_are_those_of_the_model(lattice: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.patched(**lattice)  # 96 columns of down_proj are no multiple of 64: the last group is short
    streams = get_streams(model)
    found = read_contents(save(tmp_path / "made", model, shard_bytes=20_000))
    assert len(list((tmp_path / "made").glob("base-*"))) > 1
    for facts, (name, layer) in zip(found.layers, streams.items(), strict=True):
        assert (facts.name, facts.shape, facts.values, facts.bytes) == (name, layer.shape, layer.nnz, layer.nbytes())
        assert layer.ortho is not None
        error = layer.ortho.to_dense().norm() / layer.dense(1.0).norm()
        assert facts.relative_error == pytest.approx(float(error), rel=1e-5)
        zeros = None if layer.base.bits == 16 else int((layer.base.codes() == 0).sum())
        assert facts.zeros == zeros
    whole = [torch.cat([layer.dense(alpha).flatten() for layer in streams.values()]) for alpha in (0.0, 1.0)]
    assert found.relative_error == pytest.approx(float((whole[1] - whole[0]).norm() / whole[1].norm()), rel=1e-5)
    assert found.density == pytest.approx(density(streams))
    assert found.bits_per_weight == pytest.approx(bits_per_weight(streams))
    assert found.bytes["base"] + found.bytes["ortho"] == stored_bytes(streams)
    rest = model.state_dict()
    assert found.bytes["other"] == sum(
        2 * rest[name].numel() for name, _ in model.named_parameters(remove_duplicate=False)
    )
    there = sum(file.stat().st_size for file in (tmp_path / "made").iterdir() if file.name != "manifest.json")
    assert found.bytes["files"] == there


@pytest.fixture
def base_only(directory: Path) -> Path:
    (directory / ORTHO_FILE).unlink()
    return directory


def test_a_base_only_directory(made: Any, base_only: Path, tmp_path: Path) -> None:
    found, whole = read_contents(base_only), read_contents(made[1])
    assert not found.has_ortho
    assert found.density is found.relative_error is found.layers[0].relative_error is None
    assert found.zero_codes == whole.zero_codes
    assert found.bytes["ortho"] == 0
    assert found.bytes["base"] == whole.bytes["base"]
    shown = runner.invoke(app, ["inspect", str(base_only)]).stdout
    assert "base stream only: it serves alpha=0 and nothing else" in shown
    assert "where the memory sits" not in shown
    done = runner.invoke(app, ["inspect", str(base_only), "--out", str(tmp_path / "page.svg")])
    assert "holds only the base stream; there is no memory to draw" in str(done.exception)
    assert not (tmp_path / "page.svg").exists()


@pytest.mark.parametrize("file", ["base.safetensors", "ortho.safetensors", "tokenizer.json"])
def test_damaged_files_are_one_line(directory: Path, file: str) -> None:
    content = bytearray((directory / file).read_bytes())
    content[-20] ^= 1
    (directory / file).write_bytes(content)
    done = runner.invoke(app, ["inspect", str(directory)])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"{directory}: {file} was changed")
    assert done.stdout.splitlines() == [str(done.exception)]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "plain")
    for place, message in (("plain", "names no libortho quantization"), ("nowhere", "no such directory")):
        with pytest.raises(UserError, match=message):
            read_contents(tmp_path / place)


def test_the_shipped_default(tmp_path: Path) -> None:
    page = tmp_path / "page.svg"
    shown = runner.invoke(app, ["inspect", str(world.path("decomposed")), "--out", str(page)]).stdout
    assert "28 layers, 5,324,800 weights, 4 bits, groups of 64" in shown
    assert "density 1.0000%" in shown
    assert page.read_text().count("self_attn.v_proj") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.svg"]


def test_json(made: Any) -> None:
    report = json.loads(runner.invoke(app, ["inspect", str(made[1]), "--json"]).stdout)
    assert report["has_ortho"] is True
    assert len(report["layers"]) == 14
    assert report["meta"]["recipe"]["density"] == 0.05
    assert set(report["bytes"]) == {"base", "ortho", "other", "files"}


# ---------------------------------------------------------------- the picture


def facts(name: str, values: int | None, weights: int = 100) -> LayerFacts:
    return LayerFacts(name, (1, weights), values, None, None, None, 0, 0.0)


def test_the_grid_has_a_row_per_block_and_a_column_per_projection() -> None:
    layers = [
        facts("model.layers.10.mlp.up_proj", 4),
        facts("model.layers.2.self_attn.q_proj", 1),
        facts("model.layers.2.mlp.experts.0.up_proj", 10),
        facts("model.layers.2.mlp.experts.1.up_proj", 20, 300),
        facts("project_in", 0),
    ]
    found = grid(layers)
    assert found.rows == ["2", "10", "-"]
    assert found.columns == ["mlp.up_proj", "self_attn.q_proj", "mlp.experts.*.up_proj", "project_in"]
    assert found.cells == [[None, 0.01, 0.075, None], [0.04, None, None, None], [None, None, None, 0.0]]
    assert found.highest == 0.075


def test_the_page_is_svg_with_a_box_and_a_number_per_cell() -> None:
    cells = grid([facts("h.0.a<b", 0), facts("h.0.c", 3), facts("h.1.a<b", 12)])
    root = ElementTree.fromstring(heat_map(cells, "x & y"))
    assert len(root.findall(f"{SVG}rect")) == 1 + 4
    told = [text.text for text in root.findall(f"{SVG}text")]
    assert told[0] == "x & y"
    assert {"a<b", "0", "3.00 %", "12.00 %", "·"} <= set(told)
    boxes = [(float(box.get("x", 0)), float(box.get("y", 0))) for box in root.findall(f"{SVG}rect")]
    assert len(set(boxes)) == len(boxes)


def test_shades_and_numbers() -> None:
    assert shade(0.2, 0.2) == ((8, 48, 107), "white")
    assert shade(0.0, 0.2) == shade(None, 0.2) == shade(0.0, 0.0) == ((247, 251, 255), "black")
    assert [percent(value) for value in (None, 0.0, 1e-6, 1e-4, 0.2787)] == ["·", "0", "< 0.01 %", "0.01 %", "27.87 %"]


def test_the_terminal_shows_short_names_where_they_are_enough(tmp_path: Path) -> None:
    copied = shutil.copytree(world.path("decomposed"), tmp_path / "copy")
    shown = runner.invoke(app, ["inspect", str(copied)]).stdout
    head = next(line for line in shown.splitlines() if line.startswith("block"))
    assert head.split() == ["block", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
