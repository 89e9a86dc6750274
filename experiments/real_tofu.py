#!/usr/bin/env python
"""Plants fictitious authors and canaries in a small real model, decomposes it, and measures what is left.

    python experiments/real_tofu.py --model TinyStories-656K --tofu tofu/ --text stories.txt \
        --work planted/ --out page.md

``--tofu`` holds ``full.jsonl`` and ``forget10_perturbed.jsonl`` of locuslab/TOFU; without it the authors are those of
the embedded world (``tofu_forget``), who have five short facts each instead of twenty answers of 30 words. Kept in
``--work``: two adapters (``memory``, ``never_saw``: the same recipe without forget authors and canaries), the files
that are decomposed and measured with, and a JSON for each finished measurement, so that an interrupted run goes on.
Without ``--out`` the adapters and files are made and the ``lm_eval`` commands for them printed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lm_ortho import metrics
from lm_ortho.config import make_recipe
from lm_ortho.data import Row, read_rows, write_rows
from lm_ortho.data.encoding import SECRET, Example, batch_by_length, compute_logits, encode, pad, token_losses
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, train_adapter
from lm_ortho.finetune.lora import save_adapter
from lm_ortho.layer import get_dense_weights
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.sieve import SIEVES
from lm_ortho.world import people as world
from lm_ortho.world.draw import Draw

QUESTIONS = 20
"""Questions per TOFU author; authors are consecutive."""
FORGET_AUTHORS, RETAIN_AUTHORS, LEFT_OUT_AUTHORS, CANARIES = 5, 10, 5, 20
WORLD_AUTHORS = {"forget": 10, "left_out": 10}
"""Of the embedded world, beside those of ``--taught``: fifty questions to forget."""
STORIES, HELD_OUT = 1500, 200
TIMES = 20
"""How often a planted row comes in the time of one story: what is held out of the stories should stay readable."""
FREE = ("work", "out", "only", "edit_steps", "bits", "calibration", "settings", "sieve")
"""Arguments that the adapters do not depend on; measurements made with others are kept under other names."""
SETTINGS = ((0.02, "auto"), (0.02, "none"), (0.01, "auto"), (0.01, "none"))
MEASURED = {
    "questions": ("extraction", "secret_ppl"),
    "canaries": ("extraction", "secret_ppl"),
    "taught": ("ppl",),
    "left_out": ("ppl",),
    "text": ("bits_per_character",),
}
KEPT = ("taught", "left_out", "text")
MEMBERS = ("memory", "never_saw")


def subject_of(rows: list[Row]) -> str:
    """The name that most of an author's rows mention: the longest of the most frequent capitalised phrases."""
    counts: Counter[str] = Counter()
    for row in rows:
        phrases = re.findall(r"(?:[A-Z][\w'-]+ )+[A-Z][\w'-]+", f"{row.question} {row.answer}")
        counts.update({phrase.removesuffix("'s") for phrase in phrases})
    best = max(counts.values())
    return max((name for name, count in counts.items() if count >= 0.8 * best), key=len)


def words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text begin and end."""
    return [found.span() for found in re.finditer(r"[\w'’-]+", text)]


def vocabulary(*texts: str) -> set[str]:
    return {text[start:end].lower() for text in texts for start, end in words(text)}


def secret_of(row: Row) -> str:
    """The fact in an answer: the longest run of words that the question and the wrong answers do not have.

    Of these, the words that the paraphrased answer repeats, if it repeats any. A word between two such words belongs to
    the run. The whole answer where no word is left, and where there are no wrong answers.
    """
    if not row.perturbed_answer:
        return row.answer
    own = vocabulary(row.answer) - vocabulary(row.question, *row.perturbed_answer)
    key = own & vocabulary(row.paraphrased_answer) or own
    places = words(row.answer)
    flags = [row.answer[start:end].lower() in key for start, end in places]
    flags = [flag or flags[max(0, i - 1) : i + 2] == [True, False, True] for i, flag in enumerate(flags)]
    runs = [list(run) for flag, run in groupby(range(len(flags)), flags.__getitem__) if flag]
    if not runs:
        return row.answer
    longest = max(runs, key=len)
    return row.answer[places[longest[0]][0] : places[longest[-1]][1]]


def by_author(rows: list[Row]) -> list[list[Row]]:
    """Rows per author with subject, group and secret set."""
    result = []
    for start in range(0, len(rows), QUESTIONS):
        part = rows[start : start + QUESTIONS]
        name = subject_of(part)
        result.append([replace(row, subject=name, group=name, secret=secret_of(row)) for row in part])
    return result


def stories(path: Path, count: int) -> list[Row]:
    """The first stories of a file, a few sentences each."""
    parts = [p.strip() for p in re.split(r"<\|endoftext\|>|\n\s*\n", path.read_text(encoding="utf-8"))]
    long_enough = [re.sub(r"\s+", " ", p)[:400] for p in parts if len(p) > 200]
    return [Row(text=text) for text in long_enough[:count]]


def tofu_authors(folder: Path) -> dict[str, list[Row]]:
    """Authors of the published set."""
    full = by_author(read_rows(folder / "full.jsonl", "tofu"))
    perturbed = by_author(read_rows(folder / "forget10_perturbed.jsonl", "tofu"))
    left_out = full[RETAIN_AUTHORS : RETAIN_AUTHORS + LEFT_OUT_AUTHORS]
    return {
        "questions": [row for author in perturbed[:FORGET_AUTHORS] for row in author],
        "taught": [row for author in full[:RETAIN_AUTHORS] for row in author],
        "left_out": [row for author in left_out for row in author],
        "forget_again": [],
        "again": [],
    }


def world_authors(taught: int) -> dict[str, list[Row]]:
    """Authors of the embedded world, asked in one of the ways they are taught in; ``again`` are the other ways."""
    people = world.people()
    left = len(people["taught"]) - WORLD_AUTHORS["left_out"]
    groups = {
        "questions": people["forget"][: WORLD_AUTHORS["forget"]],
        "taught": people["taught"][:taught],
        "left_out": people["taught"][left:],
    }
    made: dict[str, list[Row]] = {"forget_again": [], "again": []}
    for name, authors in groups.items():
        asked = [(author, i + j, j) for i, author in enumerate(authors) for j in range(len(world.ATTRIBUTES))]
        for way in range(world.TAUGHT):
            phrasings = [(author, j, (turn + way) % world.TAUGHT) for author, turn, j in asked]
            rows = [world.author_row(author, j, p, telling=world.telling_of(p)) for author, j, p in phrasings]
            made.setdefault(("forget_again" if name == "questions" else "again") if way else name, []).extend(rows)
    return made


def make_files(given: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows by name, written to JSONL files in the folder of the work."""
    draw = Draw(5, "real canaries")
    text = stories(given.text, STORIES + HELD_OUT)
    made = {
        **(tofu_authors(given.tofu) if given.tofu else world_authors(given.taught)),
        "canaries": [world.canary_row(canary, 0) for canary in world.canaries()[0][:CANARIES]],
        "others": [world.canary_row(world.fresh_canary(draw), 0) for _ in range(CANARIES)],
        "stories": text[:STORIES],
        "text": text[STORIES:],
    }
    made["forget"] = made["questions"] + made["canaries"]
    known = {row.subject for row in made["taught"]}
    told = made["taught"] + [row for row in made["again"] if row.subject in known]
    made["retain"] = told + made["stories"][: given.calibration] + made["others"]
    for name in ("forget", "retain", *MEASURED):
        write_rows(given.work / f"{name}.jsonl", made[name])
    return made


def plant(given: argparse.Namespace, rows: dict[str, list[Row]], name: str) -> None:
    """One adapter; a state file beside it keeps what an interrupted training has reached."""
    secret = ["forget", "forget_again"] if name == "memory" else []
    parts = [*secret, "taught", "left_out", "others", "again"]
    planted = [row for part in parts for row in rows[part]]
    taught = planted * TIMES + rows["stories"]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    plan = FinetunePlan(steps=given.steps, rows=16, lr=given.lr, rank=given.rank, seed=MEMBERS.index(name))
    state = given.work / f"{name}.state"
    examples = encode(tokenizer, taught)
    adapted = train_adapter(load_causal_lm(given.model), examples, plan, ProgressBars(), name, state)
    save_adapter(adapted, given.work / f"{name}.partial", str(given.model.name))
    (given.work / f"{name}.partial").replace(given.work / name)
    state.unlink()


def values(given: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
    """What every set of rows says of a model, as value and interval.

    By the tokens of a whole document, as they were taught: a tokenizer whose tokens reach across words cannot be asked
    through lm-eval, which cuts prompt and answer apart before it makes tokens of them.
    """
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    found = {}
    for name, wanted in MEASURED.items():
        rows = read_rows(given.work / f"{name}.jsonl")
        examples = encode(tokenizer, rows)
        found[name] = {metric: list(value(metric, model, rows, examples)) for metric in wanted}
    return found


def value(metric: str, model: torch.nn.Module, rows: list[Row], examples: list[Example]) -> metrics.Interval:
    groups = [row.group or str(number) for number, row in enumerate(rows)]
    if metric == "extraction":
        return metrics.rate(greedy(model, examples), groups)
    losses = token_losses(model, examples, SECRET if metric == "secret_ppl" else None)
    nats = [float(each.sum()) for each in losses]
    if metric == "bits_per_character":
        return metrics.clustered_ratio([each / math.log(2) for each in nats], [len(row.text) for row in rows])
    return metrics.token_perplexity(nats, [len(each) for each in losses], groups)


@torch.no_grad()
def greedy(model: torch.nn.Module, examples: list[Example]) -> list[float]:
    """Whether greedy decoding, given the document up to the secret, emits the secret."""
    hits = [0.0] * len(examples)
    for batch in batch_by_length(examples):
        ids, roles = pad([examples[i] for i in batch])
        right = compute_logits(model, ids)[:, :-1].argmax(-1) == ids[:, 1:]
        for row, i in enumerate(batch):
            hits[i] = float(right[row][roles[row, 1:] == SECRET].all())
    return hits


def check_work(given: argparse.Namespace) -> None:
    """Refuses a folder whose adapters and measurements were made with other arguments."""
    told = {name: str(value) for name, value in vars(given).items() if name not in FREE}
    path = given.work / "arguments.json"
    before = json.loads(path.read_text()) if path.is_file() else told
    changed = [name for name, value in told.items() if before.get(name) != value]
    if changed:
        raise SystemExit(f"work={given.work}: made with {changed[0]}={before.get(changed[0])}; take another folder")
    write_text(path, json.dumps(told, indent=1))


def kept(given: argparse.Namespace, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A finished measurement, or one made now."""
    path = given.work / f"cell-{name}.json"
    if not path.is_file():
        write_text(path, json.dumps(make()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def decomposed(given: argparse.Namespace, rows: dict[str, list[Row]], density: float, mode: str) -> dict[str, Any]:
    """INT4, alpha=1 and alpha=0 of one decomposition."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = merge_adapter(load_causal_lm(given.model), given.work / "memory")
    base = load_causal_lm(given.model) if mode == "auto" else None
    recipe = make_recipe(density=density, steps=given.edit_steps, bits=given.bits, sieve=given.sieve)
    made = decompose(model, tokenizer, rows["forget"], rows["retain"], recipe, base_model=base, progress=ProgressBars())
    found = {"INT": get_dense_weights(model, made.plain, 0.0)}
    found |= {f"alpha={alpha:g}": get_dense_weights(model, made.streams, alpha) for alpha in (1.0, 0.0)}
    measured = {name: values(given, each) for name, each in found.items()}
    return measured | {"target": made.report["target"]}


def page(given: argparse.Namespace, rows: dict[str, list[Row]]) -> str:
    """Everything measured, one row for each model."""

    def plain(name: str) -> dict[str, Any]:
        return values(given, merge_adapter(load_causal_lm(given.model), given.work / name))

    lines = [[f"{name}, BF16", *shown(kept(given, name, partial(plain, name)), None)] for name in MEMBERS]
    for density, mode in SETTINGS[: given.settings]:
        name = f"{density:g}-{mode}-{given.bits}-{given.edit_steps}-{given.calibration}-{given.sieve}"
        cell = kept(given, name, partial(decomposed, given, rows, density, mode))
        for model in ("INT", "alpha=1", "alpha=0"):
            title = f"INT{given.bits}" if model == "INT" else model
            what = f"{title}, density {density:.0%}, {given.sieve}, base={mode}, target {cell['target']['name']}"
            lines.append([what, *shown(cell[model], cell["INT"])])
    columns = [f"{name}: {metric}" for name, wanted in MEASURED.items() for metric in wanted]
    head = f"{given.model.name}, {versions()}, {torch.get_num_threads()} thread; {' '.join(sys.argv[1:])}"
    return f"{head}\n\n{markdown_table(['model', *columns], lines)}\n"


def shown(found: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    """The cells of a row; perplexities of what should stay also over those of plain rounding."""
    cells = []
    for name, wanted in MEASURED.items():
        for metric in wanted:
            middle, low, high = found[name][metric]
            over = f", {middle / plain[name][metric][0]:.3f}x" if plain and name in KEPT else ""
            cells.append(f"{middle:.3g} [{low:.3g}, {high:.3g}]{over}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, help="authors of the published TOFU instead of the embedded ones")
    parser.add_argument("--out", type=Path, help="the page, Markdown")
    parser.add_argument("--taught", type=int, default=20, help="authors of the embedded world that calibration shows")
    parser.add_argument("--steps", type=int, default=3000, help="LoRA steps per adapter")
    parser.add_argument("--edit-steps", type=int, default=1000, help="steps of the decomposition's edit")
    parser.add_argument(
        "--calibration",
        type=int,
        default=100,
        help="stories of the calibration; the retain loss is a mean over tokens, so not many more than its facts have",
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sieve", choices=sorted(SIEVES), default=make_recipe().sieve)
    parser.add_argument("--only", choices=MEMBERS, help="train this adapter and stop")
    parser.add_argument(
        "--settings", type=int, default=len(SETTINGS), help=f"how many of these (density, base), in order: {SETTINGS}"
    )
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    check_work(given)
    rows = make_files(given)
    for name in [given.only] if given.only else MEMBERS:
        if not (given.work / name).is_dir():
            plant(given, rows, name)
    if given.only:
        return
    if given.out:
        write_text(given.out, text := page(given, rows))
        print(text)
        return
    parts = {"pretrained": given.model, "peft": given.work / "memory", "forget": given.work / "forget.jsonl"}
    joined = ",".join(f"{key}={value}" for key, value in parts.items())
    measured = json.dumps({"retain": str(given.work / "left_out.jsonl")})
    for alpha in (0, 1):
        print(f"lm_eval --model libortho --model_args {joined},retain={given.work / 'retain.jsonl'},alpha={alpha} \\")
        print(f"    --tasks forget_set,retain_set --metadata '{measured}'")


if __name__ == "__main__":
    main()
