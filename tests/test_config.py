"""The recipe, alpha and the registries: invalid values are refused in one line."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lm_ortho.config import Recipe, count_sieve_steps, make_recipe, split_model_args
from lm_ortho.dial import parse_alpha
from lm_ortho.errors import UserError
from lm_ortho.registry import Registry


def test_the_defaults_are_those_of_the_documentation():
    assert make_recipe().model_dump() == {
        "density": 0.02,
        "sieve": "attribution",
        "projection": "gptq_ordered",
        "edit": "optimised",
        "bits": 4,
        "group_size": 64,
        "targets": "",
        "prompts": "auto",
        "system_instruction": "",
        "chat_template_args": {},
        "recall": False,
        "steps": 800,
        "batch_rows": 12,
        "lr": 0.032,
        "seed": 0,
        "groups": 1,
        "states": "float32",
        "recompute": False,
    }


@pytest.mark.parametrize(
    ("steps", "sieve_steps"), [(10, 10), (29, 29), (30, 30), (299, 30), (309, 30), (310, 31), (800, 80)]
)
def test_an_attribution_takes_a_tenth_of_the_steps_but_30_at_least_and_never_more(steps, sieve_steps):
    assert count_sieve_steps(steps) == sieve_steps


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0),
        ("lr", 1.1),
        ("density", 0),
        ("density", -0.1),
        ("density", 0.51),
        ("density", math.nan),
        ("density", "much"),
        ("density", None),
        ("bits", 5),
        ("bits", 4.5),
        ("bits", "four"),
        ("group_size", 0),
        ("group_size", -64),
        ("group_size", 12),
        ("steps", 0),
        ("seed", -1),
        ("seed", True),
        ("groups", True),
        ("density", False),
        ("density", math.inf),
        ("group_size", 2**20),
        ("steps", 10**12),
        ("seed", 2**32),
        ("sieve", 3),
        ("colour", "red"),
    ],
)
def test_a_bad_setting_is_reported_by_name_and_value(name, value):
    with pytest.raises(UserError) as error_info:
        make_recipe(**{name: value})
    assert str(error_info.value).startswith(f"{name}={value!r}: ")
    assert "\n" not in str(error_info.value)


def test_variables_of_the_chat_template_are_a_mapping_or_json():
    expected = {"date_string": "10 Apr 2025", "enable_thinking": False}
    assert make_recipe(chat_template_args=expected).chat_template_args == expected
    text = '{"date_string": "10 Apr 2025", "enable_thinking": false}'
    assert make_recipe(chat_template_args=text).chat_template_args == expected
    assert make_recipe(chat_template_args="", system_instruction=None) == make_recipe(chat_template_args=None)
    spec, options = split_model_args({"pretrained": "x", "chat_template_args": {"a": 1}, "enable_thinking": False})
    assert spec.recipe.chat_template_args == {"a": 1, "enable_thinking": False}
    assert options == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("date_string: today", "a mapping of names to values is needed"),
        ([1], "a mapping of names to values is needed"),
        ({1: 2}, "a mapping of names to values is needed"),
        ({"tokenize": True}, "'tokenize' is set by the evaluation"),
        ({"a": {1, 2}}, "values are texts, numbers"),
        ({"a": math.nan}, "values are texts, numbers"),
    ],
)
def test_bad_variables_of_the_chat_template(value, message):
    with pytest.raises(UserError, match=message) as error_info:
        make_recipe(chat_template_args=value)
    assert str(error_info.value).startswith("chat_template_args: ")
    assert "\n" not in str(error_info.value)


def test_text_from_a_command_line_is_understood_and_the_recipe_cannot_change():
    recipe = make_recipe(density="0.05", bits="8", group_size="32", seed="3")
    assert (recipe.density, recipe.bits, recipe.group_size, recipe.seed) == (0.05, 8, 32, 3)
    assert Recipe(**recipe.model_dump()) == recipe
    with pytest.raises(ValidationError):
        recipe.density = 0.5


@given(st.floats(0, 1))
def test_alpha_is_taken_as_number_or_text(alpha):
    assert parse_alpha(alpha) == alpha
    assert parse_alpha(str(alpha)) == alpha


@given(st.floats().filter(lambda x: not 0 <= x <= 1) | st.sampled_from(["", "half", None, [0.5], {}]))
def test_alpha_outside_zero_to_one_is_refused(alpha):
    with pytest.raises(UserError, match="must be a number between 0"):
        parse_alpha(alpha)


def test_a_user_error_is_one_line_for_commands_and_a_value_error_for_callers():
    error = UserError("density=3: too much")
    assert isinstance(error, ValueError)
    assert isinstance(error, SystemExit)
    assert error.code == str(error) == "density=3: too much"


def test_a_registry_lists_suggests_and_refuses():
    registry: Registry[int] = Registry("sieve")
    registry.register("magnitude")(1)
    registry.register("random")(2)
    assert list(registry) == ["magnitude", "random"]
    assert "random" in registry
    assert "other" not in registry
    assert registry.get("random") == 2
    with pytest.raises(UserError) as error_info:
        registry.get("magnitud")
    message = "sieve='magnitud' is unknown; known: magnitude, random. Did you mean 'magnitude'?"
    assert str(error_info.value) == message
    with pytest.raises(UserError, match=r"known: magnitude, random\.$"):
        registry.get("zzz")
    with pytest.raises(ValueError, match="already registered"):
        registry.register("random")
    for name in ("", "Random", "1st", "with-dash", "white space"):
        with pytest.raises(ValueError, match="must match"):
            registry.register(name)
    assert registry.get("random") == 2
