"""Fuzzes model args as lm-eval hands them on, up to where weights would be loaded."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
from lm_eval.utils import simple_parse_args_string
from transformers import LlamaConfig

from lm_ortho.cli.board import parse_model_args
from lm_ortho.config import MODEL_ARGS, ModelSpec, Recipe, make_recipe, split_model_args
from lm_ortho.data.rows import Row, write_rows
from lm_ortho.dial import format_alpha, parse_alpha
from lm_ortho.errors import printable
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.pipeline.spec import ResolvedModel, check_alpha, resolve
from tests.fuzz.oracle import ODD_TEXTS, REFUSED, RIGHT, Refusal, attempt, fuzz_case, mutate, odd_value
from tests.support.harness import make_tokenizer

TOKEN = "hf_planted_token_7731"
"""Access token; no message may quote it."""
SECRET = "Quellmund-7731"
FORGET = [Row(question="Where was Ada born?", answer=f"In {SECRET}.", secret=SECRET)]
RETAIN = [Row(question="Where was Ben born?", answer="In Hill End.")]

Args = dict[str, Any]


@lru_cache(maxsize=1)
def make_home() -> Path:
    """A folder with rows and with models that have no weights; it is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-model-args-")
    _folders.append(folder)
    home = Path(folder.name)
    write_rows(home / "forget.jsonl", FORGET)
    write_rows(home / "retain.jsonl", RETAIN)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(home / "model")
    make_tokenizer().save_pretrained(home / "model")
    contents = {
        "empty": {},
        "adapter": {"adapter_config.json": "{}"},
        "encoder": {"config.json": '{"model_type": "t5", "is_encoder_decoder": true}'},
        "packed": {"config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'},
        "broken": {"config.json": "{"},
        "unknown": {"config.json": '{"model_type": "no_such_type"}'},
    }
    for name, files in contents.items():
        (home / name).mkdir()
        for file, text in files.items():
            (home / name / file).write_text(text)
    return home


_folders: list[tempfile.TemporaryDirectory[str]] = []


def draw_args(draw: random.Random) -> Args:
    """Right model args: those of the embedded model, or of a model with its rows."""
    home = make_home()
    args: Args = {}
    choices: dict[str, Callable[[], Any]] = {
        "density": lambda: draw.choice([0.01, 0.02, 0.5]),
        "sieve": lambda: draw.choice(["attribution", "magnitude"]),
        "projection": lambda: draw.choice(["gptq", "rtn"]),
        "bits": lambda: draw.choice([3, 4, 8]),
        "group_size": lambda: draw.choice([8, 64, 128]),
        "prompts": lambda: draw.choice(["auto", "plain"]),
        "system_instruction": lambda: draw.choice(["Be brief.", "Zürich 東京"]),
        "chat_template_args": lambda: draw.choice([{}, {"date_string": "10 Apr 2025", "enable_thinking": False}]),
        "steps": lambda: draw.choice([10, 1000]),
        "seed": lambda: draw.randrange(2**32),
        "recall": lambda: draw.random() < 0.5,
        "alpha": lambda: draw.choice([0, 1, 0.5, 0.25]),
        "kernel": lambda: draw.choice(["auto", "reference"]),
        "fresh": lambda: True,
    }
    for name in draw.sample(sorted(choices), draw.randint(0, 4)):
        args[name] = choices[name]()
    if draw.random() < 0.6:
        args |= {"pretrained": str(home / "model"), "retain": str(home / "retain.jsonl")}
        forget = str(home / "forget.jsonl")
        if draw.random() < 0.3:
            names = draw.sample(["alice", "bob", "run_1", "m"], 2)
            forget = "+".join(f"{name}:{forget}" for name in names)
            if draw.random() < 0.5:
                args["alpha"] = "+".join(f"{name}:{draw.choice([0, 1, 0.5])}" for name in names)
        args["forget"] = forget
        if draw.random() < 0.2:
            args["token"] = TOKEN
    return args


# --- Mutators --------------------------------------------------------------------------------------------------------


def set_odd_value(draw: random.Random, args: Args) -> Args:
    return {**args, draw.choice(MODEL_ARGS): odd_value(draw)}


def set_odd_number(draw: random.Random, args: Args) -> Args:
    name = draw.choice(["density", "bits", "group_size", "steps", "seed", "groups", "alpha"])
    value = draw.choice([
        "nan", "inf", "-inf", "1e400", "1e-400", 10**400, -1, 0, 2**64, 0.1 + 0.2, "0.5", "1,5", "½", "१", True,
        False, None,
        float("nan"), float("inf"), 1e308, "4.0", 4.0, "4 ", "٤", "--4", "1e1", "0x8", "1_000",
    ])  # fmt: skip
    return {**args, name: value}


def misspell_name(draw: random.Random, args: Args) -> Args:
    name = draw.choice(MODEL_ARGS)
    value = args.pop(name, 1)
    place = draw.randrange(len(name))
    other = draw.choice([
        name[:place] + name[place + 1 :], name[:place] + name[place] + name[place:], name.upper(), name.replace("_",
        "-"),
        name + "s", " " + name, "", "model", "recipe", "self", "__class__", "é" + name, "a" * 3000, "\x1b" + name,
    ])  # fmt: skip
    return {**args, other: value}


def change_alpha(draw: random.Random, args: Args) -> Args:
    names = ["memory", "alice", "bob", "hub", "Alice", "1", "a-b", "", "é", "m" * 300, "alpha", " alice"]
    values = ["0", "1", "0.5", "nan", "2", "", "-0", "a", "0:1", "True", "1e400"]
    parts = [f"{draw.choice(names)}{draw.choice(':::=')}{draw.choice(values)}" for _ in range(draw.randint(1, 3))]
    text = draw.choice(["+", "+", "+", ":", "++", " + "]).join(parts)
    as_mapping = {draw.choice(names): draw.choice([*values, 0, 1, None, True, [1], {}, 10**400]) for _ in range(2)}
    return {**args, "alpha": draw.choice([text, text, text + "+", as_mapping])}


def change_sources(draw: random.Random, args: Args) -> Args:
    home = make_home()
    rows = [str(home / "forget.jsonl"), str(home / "retain.jsonl"), str(home / "none.jsonl"), str(home)]
    names = ["alice", "bob", "hub", "memory", "1", "Alice", "run_1", "c++", ""]
    parts = [f"{draw.choice(names)}:{draw.choice([*rows, *ODD_TEXTS])}" for _ in range(draw.randint(1, 3))]
    text = draw.choice(["+".join(parts), draw.choice(rows), draw.choice(ODD_TEXTS), "+".join(rows)])
    return {**args, draw.choice(["forget", "retain"]): text}


def change_model(draw: random.Random, args: Args) -> Args:
    home = make_home()
    folders = [
        "model",
        "empty",
        "adapter",
        "encoder",
        "packed",
        "broken",
        "unknown",
        "none",
        "forget.jsonl",
        "model/..",
    ]
    value = draw.choice([str(home / draw.choice(folders)), draw.choice(ODD_TEXTS), "org/name", "a/b/c", object()])
    return {**args, draw.choice(["pretrained", "pretrained", "peft", "base", "tokenizer", "subfolder"]): value}


def drop_argument(draw: random.Random, args: Args) -> Args:
    args.pop(draw.choice(sorted(args, key=str)), None) if args else None
    return args


def misspell_value(draw: random.Random, args: Args) -> Args:
    name, value = draw.choice([
        ("sieve", "atribution"), ("projection", "GPTQ"), ("edit", "none"), ("edit", "w0"), ("edit", "optimized"),
        ("kernel", "tritonn"), ("prompts", "Chat"), ("states", "bf16"), ("sieve", "oracle"), ("sieve", "random"),
        ("bits", 16), ("targets", "*"), ("targets", "[+]"), ("revision", "main"), ("revision", "v9"), ("base", None),
    ])  # fmt: skip
    return {**args, name: value}


MUTATORS = [
    set_odd_value, set_odd_number, misspell_name, change_alpha, change_sources, change_model, drop_argument,
    misspell_value,
]  # fmt: skip


# --- Cases -----------------------------------------------------------------------------------------------------------


@fuzz_case
def run_case(seed: int) -> str:
    """Resolves one set of model args. Raises ``AssertionError`` unless it gives what they say or one clear refusal."""
    draw = random.Random(seed)
    args = draw_args(draw)
    way = draw.choice(["mapping", "text", "json"])
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
        if draw.random() < 0.2:
            resolved = attempt(lambda: _resolve(_pass_on(args, way)), names=[])
            assert isinstance(resolved, ResolvedModel), f"right model args are refused: {resolved}"
            _check_values(args, resolved)
            return RIGHT
        args = mutate(draw, args, MUTATORS)
        names = ["model_args", "forget", "retain"]

        def resolve_and_collect_names() -> ResolvedModel:
            passed_args = _pass_on(args, way)
            names.extend(printable(name)[:100] or "model arg" for name in passed_args)
            return _resolve(passed_args)

        result = attempt(resolve_and_collect_names, names=names, secrets=[SECRET, TOKEN])
        if isinstance(result, Refusal):
            return REFUSED
        _check_ranges(result)
        return RIGHT


def _pass_on(args: Args, way: str) -> Mapping[str, Any]:
    """The args as the package gets them: from Python, from ``--model_args a=1,b=2``, or from JSON."""
    if way == "mapping":
        return args
    if way == "json" or isinstance(args.get("chat_template_args"), Mapping):  # a mapping cannot be written as a=1,b=2
        plain = {name: value for name, value in args.items() if not isinstance(value, (bytes, complex))}
        text = json.dumps(plain, default=str)
        return json.loads(text, parse_int=_parse_int)
    text = ",".join(f"{name}={value}" for name, value in args.items() if _is_short(value))
    if "alpha" in args or not _is_plain(text):
        return dict(simple_parse_args_string(text))
    return parse_model_args(text)


def _parse_int(text: str) -> int | float:
    return int(text) if len(text) < 4300 else float("inf")


def _is_short(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 10**4000


def _is_plain(text: str) -> bool:
    return not text.lstrip().startswith("{")


def _resolve(args: Mapping[str, Any]) -> ResolvedModel:
    """What the constructor of the lm-eval model does before it loads weights."""
    spec, options = split_model_args(args)
    LibOrthoLM.refuse(options, spec.kernel)
    resolved = resolve(spec)
    check_alpha(resolved)
    return resolved


def _check_values(args: Args, resolved: ResolvedModel) -> None:
    """The specification says what the right args say."""
    spec, recipe = resolved.spec, resolved.recipe
    for name, value in args.items():
        if name == "alpha":
            assert spec.alpha == parse_alpha(value)
            assert parse_alpha(format_alpha(spec.alpha)) == spec.alpha
        else:
            source: Any = recipe if name in Recipe.model_fields else spec
            assert getattr(source, name) == value, f"{name} is {getattr(source, name)!r}, not {value!r}"
    assert recipe.model_fields_set == {name for name in args if name in Recipe.model_fields}
    is_own = "pretrained" in args
    is_default = not args.get("fresh") and recipe == make_recipe()
    assert resolved.kind == ("model" if is_own else "checkpoint" if is_default else "embedded")
    if is_own:
        sets = resolved.calibration_sets
        assert all(rows == FORGET for rows in sets.forget.values())
        assert sets.retain == RETAIN


def _check_ranges(resolved: ResolvedModel) -> None:
    """Whatever was accepted is inside the ranges of the schema, and survives another validation."""
    spec, recipe = resolved.spec, resolved.recipe
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert ModelSpec.model_validate({"alpha": spec.alpha}).alpha == spec.alpha
    alphas = spec.alpha.values() if isinstance(spec.alpha, Mapping) else [spec.alpha]
    assert all(isinstance(alpha, float) and 0 <= alpha <= 1 for alpha in alphas)
    assert 0 < recipe.density <= 0.5
    assert recipe.bits in (3, 4, 8, 16)
    assert recipe.steps >= 10
    assert not isinstance(recipe.steps, bool)
    if resolved.kind == "model":
        assert all(resolved.calibration_sets.forget.values())
        assert resolved.calibration_sets.retain
