"""A package of somebody else adds a sieve, a projection, an edit, a method and an attack through entry points."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from lm_ortho.baselines import METHODS, Material
from lm_ortho.config import ModelSpec, make_recipe
from lm_ortho.edit import EDITS
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear
from lm_ortho.pipeline.cache_key import key_parts
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.spec import resolve
from lm_ortho.projection import PROJECTIONS
from lm_ortho.projection.lattice import compute_scales, expand_scales
from lm_ortho.registry import Registry
from lm_ortho.sieve import SIEVES
from lm_ortho.verdict.attacks import ATTACKS
from tests.support.paths import SUPPORT

REGISTRIES: list[Registry] = [SIEVES, PROJECTIONS, EDITS, METHODS, ATTACKS]
NAMES = ["first_columns", "truncation", "flip", "shrink", "whisper"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the example in it."""
    target = tmp_path_factory.mktemp("site")
    source = SUPPORT / "plugin_package"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    return target


@pytest.fixture
def plugins(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example is installed as long as a test runs."""
    monkeypatch.syspath_prepend(str(site))
    yield from _without_cached_plugins(monkeypatch)
    sys.modules.pop("example_plugin", None)


def _without_cached_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        vars(registry).pop("_plugins", None)
    yield
    for registry in REGISTRIES:
        vars(registry).pop("_plugins", None)


@pytest.mark.usefixtures("plugins")
def test_every_registry_lists_and_loads_the_entry_of_the_package() -> None:
    for registry, name in zip(REGISTRIES, NAMES, strict=True):
        assert name in list(registry)
        assert "example_plugin" not in sys.modules or registry is not SIEVES, "loaded when it is first requested"
        assert registry.get(name) is registry.get(name)
        assert registry.find_plugin(name) == "lm-ortho-example-plugin 0.3.0"
    assert SIEVES.find_plugin("attribution") is None


@pytest.mark.usefixtures("plugins")
def test_a_model_is_decomposed_with_them(memorised_models) -> None:
    recipe = make_recipe(
        sieve="first_columns", projection="truncation", edit="flip", density=0.1, group_size=32, seed=0
    )
    result = decompose(
        memorised_models.merged, memorised_models.tokenizer, memorised_models.forget, memorised_models.retain, recipe
    )
    supports = [streams.ortho.support() for streams in result.streams.values() if streams.ortho is not None]
    selected_columns = [int(support.any(0).nonzero().max()) for support in supports]
    assert max(selected_columns) < min(support.shape[1] for support in supports) / 2
    name, streams = next(iter(result.streams.items()))
    codes, weight = streams.base.codes(), find_linear(memorised_models.merged)[name].weight
    steps = expand_scales(compute_scales(weight, 4, 32), 32, weight.shape[1])
    truncated = (weight / steps).trunc().clamp(-7, 7)
    assert torch.equal(codes, torch.where(supports[0], -truncated, truncated))


@pytest.mark.usefixtures("plugins")
def test_a_method_makes_a_model(memorised_models) -> None:
    material = Material(
        memorised_models.tokenizer, memorised_models.merged, memorised_models.forget, memorised_models.retain
    )
    model = METHODS.get("shrink").make(material).model
    name, weight = next(iter(memorised_models.merged.named_parameters()))
    assert torch.allclose(dict(model.named_parameters())[name], 0.9 * weight, rtol=1e-2)


@pytest.mark.usefixtures("plugins", "isolated_environment")
def test_the_cache_tells_versions_of_a_plugin_apart(home: Path) -> None:
    rows = {"forget": str(home / "forget.jsonl"), "retain": str(home / "retain.jsonl")}
    spec = ModelSpec(pretrained=str(home / "plain"), recipe=make_recipe(sieve="first_columns"), **rows)
    assert key_parts(resolve(spec))["plugins"] == ["lm-ortho-example-plugin 0.3.0"]
    spec = ModelSpec(pretrained=str(home / "plain"), recipe=make_recipe(), **rows)
    assert "plugins" not in key_parts(resolve(spec))


def test_a_plugin_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry[object]("sieve", "lm_ortho.sieves")
    point = EntryPoint("broken", "no_such_module:score", "lm_ortho.sieves")
    monkeypatch.setattr("lm_ortho.registry.entry_points", lambda group: [point])
    with pytest.raises(UserError, match=r"sieve='broken': no_such_module:score .* cannot be loaded \(No module named"):
        registry.get("broken")


def test_a_name_of_ours_is_not_replaced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry[object]("sieve", "lm_ortho.sieves")
    registry.register("wanda")("ours")
    point = EntryPoint("wanda", "no_such_module:score", "lm_ortho.sieves")
    monkeypatch.setattr("lm_ortho.registry.entry_points", lambda group: [point])
    assert registry.get("wanda") == "ours"
    assert list(registry) == ["wanda"]
    assert "entry point wanda=no_such_module:score is ignored" in caplog.text
