"""Errors of the hub, and models with their own code: each gives one line with the remedy."""

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
from lm_ortho.config import ModelSpec
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, load_config, load_tokenizer, merge_adapter
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.hub import describe_hub_error, first_line, hide_access_tokens
from lm_ortho.pipeline import loading
from lm_ortho.pipeline.checkpoint_writer import write_checkpoint
from lm_ortho.pipeline.spec import download_model, resolve

pytestmark = pytest.mark.usefixtures("isolated_environment")


def make_hub_error(kind: type[errors.HfHubHTTPError]) -> Exception:
    return kind("many lines\nof the server", response=httpx2.Response(401, request=httpx2.Request("GET", "https://x")))


ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "gated": (
        lambda: make_hub_error(errors.GatedRepoError),
        "gated: ask for access at https://huggingface.co/some/model",
    ),
    "missing": (lambda: make_hub_error(errors.RepositoryNotFoundError), "no such public repository.*hf auth login"),
    "revision": (
        lambda: make_hub_error(errors.RevisionNotFoundError),
        r"revision='(v9|None)' is not there; give a branch",
    ),
    "not in the cache": (lambda: errors.LocalEntryNotFoundError("gone"), "the hub cannot be reached"),
    "offline": (lambda: errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
}


@pytest.fixture(params=ERRORS)
def hub_message(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the hub answer every request with one error; returns the expected message."""
    error, message = ERRORS[request.param]

    def refuse(*_: Any, **__: Any) -> None:
        raise error()

    for place in ("transformers.utils.hub.hf_hub_download", "transformers.utils.hub.snapshot_download"):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("peft.config.hf_hub_download", refuse)
    return message


REQUESTS: dict[str, tuple[str, Callable[[], object]]] = {
    "config": ("pretrained", lambda: load_config("some/model", revision="v9")),
    "model": ("pretrained", lambda: load_causal_lm("some/model", revision="v9")),
    "order": (
        "pretrained",
        lambda: resolve(ModelSpec(pretrained="some/model", revision="v9")),
    ),
    "base": ("base", lambda: loading.load_base(ModelSpec(base="some/model"))),
    "tokenizer": ("tokenizer", lambda: load_tokenizer("some/model", revision="v9")),
    "whole repository": ("pretrained", lambda: download_model("pretrained", "some/model", revision="v9")),
}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_an_error_of_the_hub_is_one_line(hub_message: str, request_name: str) -> None:
    argument, call = REQUESTS[request_name]
    with pytest.raises(UserError, match=hub_message) as error_info:
        call()
    assert str(error_info.value).startswith(f"{argument}='some/model'")
    assert "\n" not in str(error_info.value)


def test_an_adapter_that_cannot_be_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise make_hub_error(errors.GatedRepoError)

    monkeypatch.setattr("peft.peft_model.hf_hub_download", refuse, raising=False)
    monkeypatch.setattr("peft.config.hf_hub_download", refuse)
    with pytest.raises(UserError, match="peft='some/adapter': could not be merged") as error_info:
        merge_adapter(load_causal_lm(home / "plain"), "some/adapter")
    assert "\n" not in str(error_info.value)


def test_other_errors_keep_their_first_line() -> None:
    assert describe_hub_error(ValueError("one\ntwo")) == "one"
    assert describe_hub_error(KeyError()) == "KeyError"
    assert describe_hub_error(ValueError("x" * 1000)) == "x" * 296 + " ..."


def test_a_message_never_ends_in_mid_sentence() -> None:
    announced = "Error(s) in loading state_dict for Model:\n\tsize mismatch for a:\n  3 and 4.\n\tsize mismatch for b"
    assert first_line(RuntimeError(announced)) == (
        "Error(s) in loading state_dict for Model: size mismatch for a: 3 and 4."
    )
    sentences = "Model: " + "This is one sentence. " * 30
    assert first_line(RuntimeError(sentences)).endswith("This is one sentence.")
    assert 250 < len(first_line(RuntimeError(sentences))) <= 300
    words = first_line(RuntimeError("word " * 200))
    assert words.endswith("word ...")
    assert len(words) <= 300


# ---------------------------------------------------------------- a model with its own code

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
def remote_code_model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plain model with its own model class; a question on the terminal fails the test."""
    model = Path(shutil.copytree(home / "plain", tmp_path / "own"))
    (model / "configuration_own.py").write_text(CONFIGURATION)
    (model / "modeling_own.py").write_text(MODELING)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return model


def test_code_of_a_model_runs_only_where_it_is_trusted(home: Path, remote_code_model: Path, tmp_path: Path) -> None:
    recipe = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "density": 0.02, "group_size": 16}
    sets = {"forget": str(home / "forget.jsonl"), "retain": str(home / "retain.jsonl")}
    trust = {"trust_remote_code": True}
    spec = ModelSpec(pretrained=str(remote_code_model), force=True, recipe=recipe, **trust, **sets)
    output = tmp_path / "checkpoint"
    calls_without_trust: list[Callable[[], object]] = [
        lambda: resolve(ModelSpec(pretrained=str(remote_code_model), recipe=recipe, **sets)),
        lambda: load_causal_lm(remote_code_model),
    ]
    write_checkpoint(spec, output)
    calls_without_trust += [
        lambda: checkpoint.load(output),
        lambda: read_contents(output),
        lambda: export(output, tmp_path / "no"),
    ]
    for call in calls_without_trust:
        with pytest.raises(UserError, match=r"code of its own; .* trust_remote_code=True") as error_info:
            call()
        assert "\n" not in str(error_info.value)
    assert not (tmp_path / "no").exists()

    loaded_model = checkpoint.load(output, **trust)
    assert type(loaded_model).__name__ == "OwnForCausalLM"
    assert read_contents(output, **trust).density == pytest.approx(0.02, abs=0.001)
    export(output, tmp_path / "plain", **trust)
    assert (tmp_path / "plain" / "modeling_own.py").is_file()
    lm = LibOrthoLM(str(output), device="cpu", **trust)
    assert torch.equal(lm.model.lm_head.weight.float(), loaded_model.lm_head.weight.float())


# ---------------------------------------------------------------- access tokens


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("lm-ortho sweep --model_args pretrained=a,token=hf_abcdefghij1234,bits=4", "pretrained=a,token=...,bits=4"),
        (
            """'{"pretrained": "a", "token": "secret", "bits": 4}'""",
            """"pretrained": "a", "token": "...", "bits": 4}'""",
        ),
        ("HF_TOKEN=hf_abcdefghij1234 lm_eval", "HF_TOKEN=... lm_eval"),
        ("eos_token=</s>,prefix_token_id=3", "eos_token=</s>,prefix_token_id=3"),
    ],
)
def test_access_tokens_are_hidden(text: str, hidden: str) -> None:
    assert hide_access_tokens(text).endswith(hidden)
