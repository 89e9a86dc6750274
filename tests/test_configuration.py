"""One schema: what is declared in ``lm_ortho.config`` is what every user interface offers."""

from __future__ import annotations

from inspect import signature
from types import ModuleType

import pytest
from typer.main import get_command

from lm_ortho.cli.app import app
from lm_ortho.config import (
    MODEL_ARGS,
    ModelSource,
    ModelSpec,
    Recipe,
    Training,
    make_recipe,
    make_spec,
    split_model_args,
)
from lm_ortho.errors import UserError
from lm_ortho.leaderboard.config import Model, make_board
from lm_ortho.pipeline.spec import resolve
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return load_script(REPOSITORY / "scripts" / "configuration_reference.py")


def options_of(command: str) -> set[str]:
    root = get_command(app)
    parameters = root.commands[command].params  # type: ignore[attr-defined]
    return {str(parameter.name) for parameter in parameters}


def test_the_page_and_the_readme_are_those_of_the_schema(reference: ModuleType) -> None:
    """`python scripts/configuration_reference.py` writes them."""
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()
    text = reference.README.read_text(encoding="utf-8")
    assert text == reference.readme(text)
    assert all(f"| `{name}` |" in text for name in MODEL_ARGS)


@pytest.mark.parametrize("schema", [ModelSpec, Recipe, Training, Model])
def test_every_field_has_a_sentence(schema) -> None:
    for name, field in schema.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert field.description[0].isupper() or field.description.startswith("`"), name


def test_options_of_commands_are_fields() -> None:
    assert {*ModelSource.model_fields, "tokenizer", *Recipe.model_fields} <= options_of("decompose")
    assert set(Training.model_fields) <= options_of("implant")


def test_keys_of_a_board_are_fields() -> None:
    assert set(Model.model_fields) == {*ModelSource.model_fields, "never_saw"}
    board = {"name": "b", "methods": [{"method": "ortho"}], "tasks": ["t"], "models": {"m": {"base": "none"}}}
    with pytest.raises(UserError, match="the embedded model has its own adapter and rows"):
        make_board(board)


def test_the_lm_eval_model_declares_no_model_arg_itself() -> None:
    from lm_ortho.harness.model import LibOrthoLM

    assert set(signature(LibOrthoLM).parameters) & set(MODEL_ARGS) == {"pretrained"}  # lm-eval passes it by position


def test_model_args_become_a_specification() -> None:
    args = {"density": 0.02, "forget": "f.jsonl", "alpha": "a:0+b:1", "base": None, "batch_size": 4}
    spec, options = split_model_args(args)
    assert (spec.forget, spec.alpha, spec.base) == ("f.jsonl", {"a": 0.0, "b": 1.0}, "none")
    assert spec.recipe == make_recipe(density=0.02)
    assert spec.recipe.model_fields_set == {"density"}
    assert options == {"batch_size": 4}


def test_names_that_lm_eval_reads_as_whole_numbers_are_names() -> None:
    names = {"pretrained": 2023, "peft": 1, "base": 7, "forget": 2024, "retain": 2025, "revision": 42, "tokenizer": 3}
    spec, _ = split_model_args(names)
    assert {name: getattr(spec, name) for name in names} == {name: str(number) for name, number in names.items()}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"density": 0.9}, "density=0.9: Input should be less than or equal to 0.5"),
        ({"alpha": 1.5}, r"^alpha=1.5 must be a number between 0 \(forget\) and 1 \(remember\)$"),
        ({"fresh": "perhaps"}, "fresh='perhaps': Input should be a valid boolean"),
        ({"alpha": True}, "^alpha=True: a number is needed, not true or false"),
        ({"alpha": {"alice": False}}, "^alpha: a number is needed, not true or false"),
        ({"forget": ["f.jsonl"]}, "forget=.*: Input should be a valid string"),
        (
            {"forget": 1e5},
            r"forget=100000.0: lm-eval reads this name as a value .*; write it as a path, such as ./NAME",
        ),
        ({"pretrained": 1.5}, "pretrained=1.5: lm-eval reads this name"),
        ({"peft": True}, "peft=True: lm-eval reads this name"),
        ({"tokenizer": False}, "tokenizer=False: lm-eval reads this name"),
        ({"pretrained": "a" * 300}, r"pretrained='a+.*: cannot be looked up \(File name too long\)"),
        ({"base": "~no_such_user_here/m"}, "base='~no_such_user_here/m': cannot be looked up"),
    ],
)
def test_a_bad_model_arg_is_named(args, message) -> None:
    with pytest.raises(UserError, match=message):
        split_model_args(args)


@pytest.mark.parametrize("value", [object(), ["org/name"]])
def test_an_object_that_is_no_model_is_refused(value) -> None:
    kind = type(value).__name__
    with pytest.raises(UserError, match=f"^pretrained is of type {kind}; give a directory, a hub id in quotes, or a"):
        resolve(make_spec(pretrained=value))


def test_a_path_is_a_directory(tmp_path) -> None:
    assert make_spec(pretrained=tmp_path).pretrained == str(tmp_path)


def test_a_model_object_takes_the_place_of_pretrained() -> None:
    model = object()
    assert make_spec(pretrained=model).model is model
    assert make_spec(pretrained=model).pretrained is None
