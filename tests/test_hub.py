"""What the hub refuses, and models with code of their own: one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub import errors

from lm_ortho import checkpoint
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.export import export
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, load_config, load_tokenizer, merge_adapter
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.hub import describe_hub_error
from lm_ortho.pipeline import build
from lm_ortho.pipeline.checkpoint_writer import write_checkpoint
from lm_ortho.pipeline.spec import ModelSpec, download, resolve

pytestmark = pytest.mark.usefixtures("small_and_alone")


def refused(kind: type[errors.HfHubHTTPError]) -> Exception:
    return kind("many lines\nof the server", response=httpx2.Response(401, request=httpx2.Request("GET", "https://x")))


ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "gated": (lambda: refused(errors.GatedRepoError), "gated: ask for access at https://huggingface.co/some/model"),
    "missing": (lambda: refused(errors.RepositoryNotFoundError), "no such public repository.*hf auth login"),
    "revision": (lambda: refused(errors.RevisionNotFoundError), r"revision='(v9|None)' is not there; give a branch"),
    "not in the cache": (lambda: errors.LocalEntryNotFoundError("gone"), "the hub cannot be reached"),
    "offline": (lambda: errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
}


@pytest.fixture(params=ERRORS)
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub that answers every question with one error, and what the user has to be told."""
    error, message = ERRORS[request.param]

    def refuse(*_: Any, **__: Any) -> None:
        raise error()

    for place in ("transformers.utils.hub.hf_hub_download", "transformers.utils.hub.snapshot_download"):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("peft.config.hf_hub_download", refuse)
    return message


WAYS: dict[str, tuple[str, Callable[[], object]]] = {
    "config": ("pretrained", lambda: load_config("some/model", revision="v9")),
    "model": ("pretrained", lambda: load_causal_lm("some/model", revision="v9")),
    "order": (
        "pretrained",
        lambda: resolve(ModelSpec(pretrained="some/model", source={"revision": "v9"})),
    ),
    "base": ("base", lambda: build.load_base(ModelSpec(base="some/model"))),
    "tokenizer": ("tokenizer", lambda: load_tokenizer("some/model", revision="v9")),
    "whole repository": ("pretrained", lambda: download("pretrained", "some/model", "v9")),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_the_hub_refuses_is_one_line(told: str, way: str) -> None:
    argument, ask = WAYS[way]
    with pytest.raises(UserError, match=told) as caught:
        ask()
    assert str(caught.value).startswith(f"{argument}='some/model'")
    assert "\n" not in str(caught.value)


def test_an_adapter_that_cannot_be_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise refused(errors.GatedRepoError)

    monkeypatch.setattr("peft.peft_model.hf_hub_download", refuse, raising=False)
    monkeypatch.setattr("peft.config.hf_hub_download", refuse)
    with pytest.raises(UserError, match="peft='some/adapter': could not be merged") as caught:
        merge_adapter(load_causal_lm(home / "plain"), "some/adapter")
    assert "\n" not in str(caught.value)


def test_other_errors_keep_their_first_line() -> None:
    assert describe_hub_error(ValueError("one\ntwo")) == "one"
    assert describe_hub_error(KeyError()) == "KeyError"
    assert len(describe_hub_error(ValueError("x" * 1000))) == 200


# ---------------------------------------------------------------- a model with code of its own

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain model under a class that transformers does not know; nobody may be asked about it."""
    model = Path(shutil.copytree(home / "plain", tmp_path / "own"))
    (model / "configuration_own.py").write_text(CONFIGURATION)
    (model / "modeling_own.py").write_text(MODELING)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return model


def test_code_of_a_model_runs_only_where_it_is_trusted(home: Path, own: Path, tmp_path: Path) -> None:
    recipe = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "density": 0.02, "group_size": 16}
    sets = {"forget": str(home / "forget.jsonl"), "retain": str(home / "retain.jsonl")}
    trust = {"trust_remote_code": True}
    order = ModelSpec(pretrained=str(own), recipe=recipe, source=trust, **sets)
    made = tmp_path / "made"
    untrusted: list[Callable[[], object]] = [
        lambda: resolve(ModelSpec(pretrained=str(own), recipe=recipe, **sets)),
        lambda: load_causal_lm(own),
    ]
    write_checkpoint(order, made)
    untrusted += [lambda: checkpoint.load(made), lambda: read_contents(made), lambda: export(made, tmp_path / "no")]
    for ask in untrusted:
        with pytest.raises(UserError, match=r"code of its own; .* trust_remote_code=True") as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "no").exists()

    loaded = checkpoint.load(made, **trust)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert read_contents(made, **trust).density == pytest.approx(0.02, abs=0.001)
    export(made, tmp_path / "plain", **trust)
    assert (tmp_path / "plain" / "modeling_own.py").is_file()
    lm = LibOrthoLM(str(made), device="cpu", **trust)
    assert torch.equal(lm.model.lm_head.weight.float(), loaded.lm_head.weight.float())
