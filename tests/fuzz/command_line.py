"""Fuzzes the command line up to where weights would be loaded: options, their values, and the places that they name."""

from __future__ import annotations

import io
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import huggingface_hub.constants
from pydantic import BaseModel

from lm_ortho import cli
from lm_ortho.config import Recipe, Training
from tests.fuzz.model_args import SECRET, make_home
from tests.fuzz.oracle import ODD_TEXTS, REFUSED, RIGHT, HangError, check_message, fuzz_case, mutate, time_limit

WEIGHT = 0.1
"""Share of the cases of a campaign relative to other domains; many of them read a configuration."""
SECONDS = 20
NO_WEIGHTS = "pretrained="
"""The end of a right command here: its model has no weights, and the message names it."""

Words = list[str]


def draw_words(draw: random.Random, out: Path) -> tuple[Words, int]:
    """The words of a right command after ``lm-ortho``, and its exit code: 1 where only the weights are missing."""
    home = make_home()
    rows = ["--forget", str(home / "forget.jsonl"), "--retain", str(home / "retain.jsonl")]
    options: Words = []
    kind = draw.choice(["decompose", "decompose", "implant", "implant", "version", "help", "cache"])
    if kind == "decompose":
        for flag, values in {"--density": "0.01 0.5", "--bits": "3 4 8", "--steps": "10 1000", "--seed": "0 7"}.items():
            if draw.random() < 0.4:
                options += [flag, draw.choice(values.split())]
        return ["decompose", "--out", str(out), "--pretrained", str(home / "model"), *rows, *options], 1
    if kind == "implant":
        for flag, values in {"--method": "lora full", "--lr": "1e-4 0.1", "--steps": "1 9", "--seed": "0 7"}.items():
            if draw.random() < 0.4:
                options += [flag, draw.choice(values.split())]
        data = ["--data", str(home / "forget.jsonl")]
        return ["implant", "--out", str(out), "--pretrained", str(home / "model"), *data, *options], 1
    command = draw.choice(["decompose", "implant", "inspect", "export", "sweep", "verdict", "bench", "board", "cache"])
    return {"version": ["--version"], "help": [command, "--help"], "cache": ["cache", "list"]}[kind], 0


# --- Mutators --------------------------------------------------------------------------------------------------------


def replace_word(draw: random.Random, words: Words) -> Words:
    if words:
        words[draw.randrange(len(words))] = draw.choice(ODD_TEXTS)
    return words


def insert_word(draw: random.Random, words: Words) -> Words:
    flags = [f"--{name.replace('_', '-')}" for name in (*Recipe.model_fields, *Training.model_fields)]
    words.insert(
        draw.randint(0, len(words)), draw.choice([*ODD_TEXTS, *flags, "-o", "--", "-", "--json", "--add", "--help"])
    )
    return words


def drop_word(draw: random.Random, words: Words) -> Words:
    if words:
        del words[draw.randrange(len(words))]
    return words


def misspell_word(draw: random.Random, words: Words) -> Words:
    if words:
        index = draw.randrange(len(words))
        word = words[index]
        words[index] = draw.choice([word[:-1], word + "x", word.upper(), word.replace("-", "_"), word + "=1", word[1:]])
    return words


def add_odd_option(draw: random.Random, words: Words) -> Words:
    schema: type[BaseModel] = draw.choice([Recipe, Training])
    name = draw.choice(sorted(schema.model_fields))
    return [*words, f"--{name.replace('_', '-')}", draw.choice(ODD_TEXTS)]


def change_command(draw: random.Random, words: Words) -> Words:
    home = make_home()
    place = draw.choice([home, home / "model", home / "forget.jsonl", home / "none", Path("/dev/null")])
    commands = [
        ["inspect", str(place)], ["export", str(place), "x/y"], ["board", "status", str(place)], ["board", "page",
        str(place)],
        ["board", "run", str(place)], ["new-task", "Bad Name", *words[1:]], ["cache", "lst"], ["decomposee"],
        ["board"], [],
    ]  # fmt: skip
    return list(draw.choice(commands))


MUTATORS: list[Callable[[random.Random, Words], Words]] = [
    replace_word, insert_word, drop_word, misspell_word, add_odd_option, add_odd_option, change_command,
]  # fmt: skip


# --- Cases -----------------------------------------------------------------------------------------------------------


@fuzz_case
def run_case(seed: int) -> str:
    """Runs one command. Raises ``AssertionError`` unless it does what it says, or ends with one clear line."""
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-command-"))
    out = folder / "out"
    try:
        words, code = draw_words(draw, out)
        is_valid = draw.random() < 0.15
        if not is_valid:
            words = mutate(draw, words, MUTATORS)
            if words[:1] == ["decompose"] or words[:1] == ["implant"]:  # never the embedded model, which has weights
                words += ["--pretrained", str(make_home() / "model")]
            elif words[:1] and words[0] in (
                "sweep",
                "verdict",
                "bench",
                "demo",
                "eval",
            ):  # they need no option to start
                words += ["--help"]
        exit_code, output, errors = run_command([word.replace("\x00", "") for word in words], folder)
        assert not out.exists(), "a refused command left its output behind"
        if is_valid:
            assert exit_code == code, f"a right command ended with {exit_code}: {errors:.300}"
            assert not code or (NO_WEIGHTS in errors and "model" in errors), f"not about the weights: {errors:.300}"
            return RIGHT
        assert exit_code in (0, 1, 2), f"exit code {exit_code}"
        assert exit_code == 0 or errors.strip() or "Usage:" in output, "a failure without a word"
        assert SECRET not in output + errors, "quotes a secret of the rows"
        if exit_code == 1:
            last = errors.strip("\n").split("\n")[-1]
            assert last.startswith("error: "), f"not one clear line: {errors[-300:]}"
            check_message(last.removeprefix("error: "), names=[""])
        return RIGHT if exit_code == 0 else REFUSED
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_command(words: Words, folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``lm-ortho`` with these words, run in this process."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["lm-ortho", *words]),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.dict("os.environ", {"LM_ORTHO_CACHE": str(folder / "cache")}),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            with time_limit(SECONDS):
                cli.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except HangError:
            raise AssertionError(f"no answer within {SECONDS} seconds") from None
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} instead of one line: {error!s:.300}") from error
    return code, output.getvalue(), errors.getvalue()
