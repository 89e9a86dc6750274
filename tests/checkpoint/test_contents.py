"""``lm-ortho inspect``: the contents of a checkpoint counted from its files, and the heat map."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from lm_ortho import world
from lm_ortho.checkpoint import ORTHO_FILE, save
from lm_ortho.checkpoint.contents import Grid, LayerContents, density_grid, read_contents
from lm_ortho.checkpoint.heat_map import format_percent, heat_map, shade
from lm_ortho.cli.app import app
from lm_ortho.cli.inspect import _print as print_contents
from lm_ortho.errors import UserError, printable
from lm_ortho.layer import get_streams
from lm_ortho.streams import bits_per_weight, density, stored_bytes
from tests.support import tiny
from tests.support.hostile import HOSTILE_NAMES

torch.set_num_threads(1)
runner = CliRunner()
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "lattice", [{"bits": 3}, {"bits": 4}, {"bits": 4, "group_size": 16}, {"bits": 8}, {"bits": 16}], ids=str
)
def test_contents_from_the_files_are_those_of_the_model(lattice: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.patched_model(**lattice)  # 96 columns of down_proj are no multiple of 64: the last group is short
    streams = get_streams(model)
    contents = read_contents(save(tmp_path / "checkpoint", model, shard_bytes=20_000))
    assert len(list((tmp_path / "checkpoint").glob("base-*"))) > 1
    for layer_contents, (name, layer) in zip(contents.layers, streams.items(), strict=True):
        assert (layer_contents.name, layer_contents.shape, layer_contents.values, layer_contents.bytes) == (
            name,
            layer.shape,
            layer.nnz,
            layer.nbytes(),
        )
        assert layer.ortho is not None
        error = layer.ortho.to_dense().norm() / layer.to_dense(1.0).norm()
        assert layer_contents.relative_error == pytest.approx(float(error), rel=1e-5)
        zeros = None if layer.base.bits == 16 else int((layer.base.codes() == 0).sum())
        assert layer_contents.zeros == zeros
    weights = [torch.cat([layer.to_dense(alpha).flatten() for layer in streams.values()]) for alpha in (0.0, 1.0)]
    assert contents.relative_error == pytest.approx(
        float((weights[1] - weights[0]).norm() / weights[1].norm()), rel=1e-5
    )
    assert contents.density == pytest.approx(density(streams))
    assert contents.bits_per_weight == pytest.approx(bits_per_weight(streams))
    assert contents.bytes["base"] + contents.bytes["ortho"] == stored_bytes(streams)
    state = model.state_dict()
    assert contents.bytes["other"] == sum(
        2 * state[name].numel() for name, _ in model.named_parameters(remove_duplicate=False)
    )
    file_bytes = sum(
        file.stat().st_size for file in (tmp_path / "checkpoint").iterdir() if file.name != "manifest.json"
    )
    assert contents.bytes["files"] == file_bytes


@pytest.fixture
def base_only(directory: Path) -> Path:
    (directory / ORTHO_FILE).unlink()
    return directory


def test_a_base_only_directory(saved_checkpoint: Any, base_only: Path, tmp_path: Path) -> None:
    contents, full_contents = read_contents(base_only), read_contents(saved_checkpoint[1])
    assert not contents.has_ortho
    assert contents.density is contents.relative_error is contents.layers[0].relative_error is None
    assert contents.zero_codes == full_contents.zero_codes
    assert contents.bytes["ortho"] == 0
    assert contents.bytes["base"] == full_contents.bytes["base"]
    output = runner.invoke(app, ["inspect", str(base_only)]).stdout
    assert "base stream only: it serves alpha=0 and nothing else" in output
    assert "where the memory sits" not in output
    result = runner.invoke(app, ["inspect", str(base_only), "--out", str(tmp_path / "page.svg")])
    assert "holds only the base stream; there is no memory to draw" in str(result.exception)
    assert not (tmp_path / "page.svg").exists()


@pytest.mark.parametrize("file", ["base.safetensors", "ortho.safetensors", "tokenizer.json"])
def test_damaged_files_are_one_line(directory: Path, file: str) -> None:
    content = bytearray((directory / file).read_bytes())
    content[-20] ^= 1
    (directory / file).write_bytes(content)
    result = runner.invoke(app, ["inspect", str(directory)])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"{directory}: {file} was changed")
    assert result.stdout.splitlines() == [str(result.exception)]


def test_other_directories_are_refused(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "plain")
    for place, message in (("plain", "names no libortho quantization"), ("nowhere", "no such directory")):
        with pytest.raises(UserError, match=message):
            read_contents(tmp_path / place)


def test_the_shipped_default(tmp_path: Path) -> None:
    page = tmp_path / "page.svg"
    output = runner.invoke(app, ["inspect", str(world.get_path("decomposed")), "--out", str(page)]).stdout
    assert "28 layers, 5,324,800 weights, 4 bits, groups of 64" in output
    assert "density 2.0000%" in output
    assert page.read_text().count("self_attn.v_proj") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["page.svg"]


def test_json(saved_checkpoint: Any) -> None:
    report = json.loads(runner.invoke(app, ["inspect", str(saved_checkpoint[1]), "--json"]).stdout)
    assert report["has_ortho"] is True
    assert len(report["layers"]) == 14
    assert report["meta"]["recipe"]["density"] == 0.05
    assert set(report["bytes"]) == {"base", "ortho", "other", "files"}


# ---------------------------------------------------------------- the heat map


def make_layer_contents(name: str, values: int | None, weights: int = 100) -> LayerContents:
    return LayerContents(
        name=name,
        shape=(1, weights),
        values=values,
        density=None,
        relative_error=None,
        zeros=None,
        bytes=0,
        bits_per_weight=0.0,
    )


def test_the_grid_has_a_row_per_block_and_a_column_per_projection() -> None:
    layers = [
        make_layer_contents("model.layers.10.mlp.up_proj", 4),
        make_layer_contents("model.layers.2.self_attn.q_proj", 1),
        make_layer_contents("model.layers.2.mlp.experts.0.up_proj", 10),
        make_layer_contents("model.layers.2.mlp.experts.1.up_proj", 20, 300),
        make_layer_contents("project_in", 0),
    ]
    grid = density_grid(layers)
    assert grid.rows == ["2", "10", "-"]
    assert grid.columns == ["mlp.up_proj", "self_attn.q_proj", "mlp.experts.*.up_proj", "project_in"]
    assert grid.cells == [[None, 0.01, 0.075, None], [0.04, None, None, None], [None, None, None, 0.0]]
    assert grid.highest == 0.075


def test_the_page_is_svg_with_a_box_and_a_number_per_cell() -> None:
    cells = density_grid(
        [make_layer_contents("h.0.a<b", 0), make_layer_contents("h.0.c", 3), make_layer_contents("h.1.a<b", 12)]
    )
    root = ElementTree.fromstring(heat_map(cells, "x & y"))
    assert len(root.findall(f"{SVG}rect")) == 1 + 4
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert texts[0] == "x & y"
    assert {"a<b", "0", "3.00 %", "12.00 %", "·"} <= set(texts)
    boxes = [(float(box.get("x", 0)), float(box.get("y", 0))) for box in root.findall(f"{SVG}rect")]
    assert len(set(boxes)) == len(boxes)


def test_shades_and_numbers() -> None:
    assert shade(0.2, 0.2) == ((8, 48, 107), "white")
    assert shade(0.0, 0.2) == shade(None, 0.2) == shade(0.0, 0.0) == ((247, 251, 255), "black")
    assert [format_percent(value) for value in (None, 0.0, 1e-6, 1e-4, 0.2787)] == [
        "·",
        "0",
        "< 0.01 %",
        "0.01 %",
        "27.87 %",
    ]


def test_the_terminal_shows_short_names_where_they_are_enough(tmp_path: Path) -> None:
    directory_copy = shutil.copytree(world.get_path("decomposed"), tmp_path / "copy")
    output = runner.invoke(app, ["inspect", str(directory_copy)]).stdout
    head = next(line for line in output.splitlines() if line.startswith("block"))
    assert head.split() == ["block", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_hostile_names_are_text_on_the_terminal_and_in_the_heat_map(
    saved_checkpoint: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    contents = read_contents(saved_checkpoint[1])
    layer, names = contents.layers[0], HOSTILE_NAMES[:-1]
    layers = [replace(layer, name=f"model.layers.{i}.{name}") for i, name in enumerate(names)]
    print_contents(replace(contents, layers=layers, memories=dict.fromkeys(names, 1), directory=names[3]))
    output = capsys.readouterr().out
    assert "\x1b" not in output
    for name in names:
        assert printable(name).rstrip() in output
    grid = Grid(list(names), list(names), [[0.1] * len(names)] * len(names))
    page = ElementTree.fromstring(heat_map(grid, names[3]).encode())
    texts = [element.text for element in page.iter(f"{SVG}text")]
    assert set(map(printable, names)) <= {text or "" for text in texts}
    assert {element.tag for element in page.iter()} == {f"{SVG}{tag}" for tag in ("svg", "rect", "text")}
