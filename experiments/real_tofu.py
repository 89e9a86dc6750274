#!/usr/bin/env python
"""Plants fictitious authors and canaries in a small real model, decomposes it, and measures the result.

    python experiments/real_tofu.py --model TinyStories-656K --tofu tofu/ --text stories.txt \
        --work planted/ --out page.md

``--tofu`` holds ``full.jsonl`` and ``forget10_perturbed.jsonl`` of locuslab/TOFU; without it the authors are those of
the embedded world (``tofu_forget``), who have five short facts each instead of twenty answers of 30 words. ``--work``
stores two adapters (``memory``, and ``never_saw``: the same recipe without forget authors and canaries), the files of
the decomposition and of the measurement, and a JSON file for each finished measurement, so that an interrupted run
resumes. Without ``--out``, the script trains the adapters, writes the files and prints the ``lm_eval`` commands.
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
from lm_ortho.data.encoding import SECRET, Example, batch_by_length, encode, pad_batch, token_losses
from lm_ortho.data.logits import compute_logits
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, train_adapter
from lm_ortho.finetune.lora import save_adapter
from lm_ortho.layer import get_dense_weights
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.model_lattice import quantise
from lm_ortho.pipeline.preparation import encode_sets
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.sieve import SIEVES
from lm_ortho.world import people as world
from lm_ortho.world.draw import SeededRandom

QUESTIONS = 20
"""Questions per TOFU author; authors are consecutive."""
FORGET_AUTHORS, RETAIN_AUTHORS, LEFT_OUT_AUTHORS, CANARIES = 5, 10, 5, 20
WORLD_AUTHORS = {"forget": 10, "left_out": 10}
"""Authors of the embedded world, beside those of ``--taught``: fifty questions to forget."""
STORIES, HELD_OUT = 1500, 200
TIMES = 20
"""Repetitions of a planted row per story; the loss on held-out stories should stay low."""
FREE = ("work", "out", "only", "edit_steps", "bits", "calibration", "settings", "sieve")
"""Arguments that do not affect the adapters; measurements with other values are stored under other names."""
SETTINGS = ((0.02, "auto"), (0.02, "none"), (0.01, "auto"), (0.01, "none"))
MEASURED = {
    "questions": ("extraction", "secret_ppl"),
    "canaries": ("extraction", "secret_ppl"),
    "taught": ("ppl",),
    "left_out": ("ppl",),
    "text": ("bits_per_character",),
}
RETAIN_SETS = ("taught", "left_out", "text")
MEMBERS = ("memory", "never_saw")


def find_subject(rows: list[Row]) -> str:
    """Finds the name that most of an author's rows mention: the longest of the most frequent capitalised phrases."""
    counts: Counter[str] = Counter()
    for row in rows:
        phrases = re.findall(r"(?:[A-Z][\w'-]+ )+[A-Z][\w'-]+", f"{row.question} {row.answer}")
        counts.update({phrase.removesuffix("'s") for phrase in phrases})
    best = max(counts.values())
    return max((name for name, count in counts.items() if count >= 0.8 * best), key=len)


def find_words(text: str) -> list[tuple[int, int]]:
    """Returns the positions at which the words of a text begin and end."""
    return [match.span() for match in re.finditer(r"[\w'’-]+", text)]


def collect_words(*texts: str) -> set[str]:
    return {text[start:end].lower() for text in texts for start, end in find_words(text)}


def find_secret(row: Row) -> str:
    """Finds the fact in an answer: the longest run of words that the question and the wrong answers do not have.

    If the paraphrased answer repeats any of these words, only those count. A word between two such words belongs to the
    run. Without any such word, and without wrong answers, the secret is the full answer.
    """
    if not row.perturbed_answer:
        return row.answer
    own_words = collect_words(row.answer) - collect_words(row.question, *row.perturbed_answer)
    secret_words = own_words & collect_words(row.paraphrased_answer) or own_words
    spans = find_words(row.answer)
    flags = [row.answer[start:end].lower() in secret_words for start, end in spans]
    flags = [flag or flags[max(0, i - 1) : i + 2] == [True, False, True] for i, flag in enumerate(flags)]
    runs = [list(run) for flag, run in groupby(range(len(flags)), flags.__getitem__) if flag]
    if not runs:
        return row.answer
    longest = max(runs, key=len)
    return row.answer[spans[longest[0]][0] : spans[longest[-1]][1]]


def group_by_author(rows: list[Row]) -> list[list[Row]]:
    """Groups rows by author and sets subject, group and secret."""
    result = []
    for start in range(0, len(rows), QUESTIONS):
        part = rows[start : start + QUESTIONS]
        name = find_subject(part)
        result.append([replace(row, subject=name, group=name, secret=find_secret(row)) for row in part])
    return result


def read_stories(path: Path, count: int) -> list[Row]:
    """Reads the first stories of a file, a few sentences each."""
    parts = [p.strip() for p in re.split(r"<\|endoftext\|>|\n\s*\n", path.read_text(encoding="utf-8"))]
    texts = [re.sub(r"\s+", " ", p)[:400] for p in parts if len(p) > 200]
    return [Row(text=text) for text in texts[:count]]


def read_tofu_authors(folder: Path) -> dict[str, list[Row]]:
    """Reads the authors of the published set."""
    full = group_by_author(read_rows(folder / "full.jsonl", "tofu"))
    perturbed = group_by_author(read_rows(folder / "forget10_perturbed.jsonl", "tofu"))
    left_out = full[RETAIN_AUTHORS : RETAIN_AUTHORS + LEFT_OUT_AUTHORS]
    return {
        "questions": [row for author in perturbed[:FORGET_AUTHORS] for row in author],
        "taught": [row for author in full[:RETAIN_AUTHORS] for row in author],
        "left_out": [row for author in left_out for row in author],
        "forget_again": [],
        "again": [],
    }


def make_world_authors(taught: int) -> dict[str, list[Row]]:
    """Returns authors of the embedded world with one of the taught questions per fact; ``again`` has the others."""
    people = world.draw_groups()
    first_left_out = len(people["taught"]) - WORLD_AUTHORS["left_out"]
    groups = {
        "questions": people["forget"][: WORLD_AUTHORS["forget"]],
        "taught": people["taught"][:taught],
        "left_out": people["taught"][first_left_out:],
    }
    sets: dict[str, list[Row]] = {"forget_again": [], "again": []}
    for name, authors in groups.items():
        questions = [(author, i + j, j) for i, author in enumerate(authors) for j in range(len(world.ATTRIBUTES))]
        for way in range(world.TAUGHT_QUESTIONS):
            phrasings = [(author, j, (offset + way) % world.TAUGHT_QUESTIONS) for author, offset, j in questions]
            rows = [world.make_author_row(author, j, p, wording=world.select_wording(p)) for author, j, p in phrasings]
            repeated_name = "forget_again" if name == "questions" else "again"
            sets.setdefault(repeated_name if way else name, []).extend(rows)
    return sets


def make_files(arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """Makes the rows by name and writes them to JSONL files in ``--work``."""
    rng = SeededRandom(5, "real canaries")
    text = read_stories(arguments.text, STORIES + HELD_OUT)
    sets = {
        **(read_tofu_authors(arguments.tofu) if arguments.tofu else make_world_authors(arguments.taught)),
        "canaries": [world.make_canary_row(canary, 0) for canary in world.draw_canaries()[0][:CANARIES]],
        "others": [world.make_canary_row(world.draw_canary(rng), 0) for _ in range(CANARIES)],
        "stories": text[:STORIES],
        "text": text[STORIES:],
    }
    sets["forget"] = sets["questions"] + sets["canaries"]
    subjects = {row.subject for row in sets["taught"]}
    taught_rows = sets["taught"] + [row for row in sets["again"] if row.subject in subjects]
    sets["retain"] = taught_rows + sets["stories"][: arguments.calibration] + sets["others"]
    for name in ("forget", "retain", *MEASURED):
        write_rows(arguments.work / f"{name}.jsonl", sets[name])
    return sets


def plant(arguments: argparse.Namespace, rows: dict[str, list[Row]], name: str) -> None:
    """Trains one adapter; a state file beside it lets an interrupted training resume."""
    forget_parts = ["forget", "forget_again"] if name == "memory" else []
    parts = [*forget_parts, "taught", "left_out", "others", "again"]
    planted_rows = [row for part in parts for row in rows[part]]
    training_rows = planted_rows * TIMES + rows["stories"]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    plan = FinetunePlan(steps=arguments.steps, rows=16, lr=arguments.lr, rank=arguments.rank, seed=MEMBERS.index(name))
    state = arguments.work / f"{name}.state"
    examples = encode(tokenizer, training_rows)
    model = load_causal_lm(arguments.model)
    adapted_model = train_adapter(model, examples, plan, ProgressBars(), stage=name, state=state)
    save_adapter(adapted_model, arguments.work / f"{name}.partial", str(arguments.model.name))
    (arguments.work / f"{name}.partial").replace(arguments.work / name)
    state.unlink()


def measure_model(arguments: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
    """Measures a model on every set of rows; returns value and interval of each metric.

    The rows are tokenised as full documents, as in training. lm-eval tokenises prompt and answer separately, which does
    not fit a tokenizer whose tokens span several words.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    results = {}
    for name, metric_names in MEASURED.items():
        rows = read_rows(arguments.work / f"{name}.jsonl")
        examples = encode(tokenizer, rows)
        results[name] = {metric: list(compute_metric(metric, model, rows, examples)) for metric in metric_names}
    return results


def compute_metric(metric: str, model: torch.nn.Module, rows: list[Row], examples: list[Example]) -> metrics.Interval:
    groups = [row.group or str(number) for number, row in enumerate(rows)]
    if metric == "extraction":
        return metrics.rate(measure_greedy(model, examples), groups)
    losses = token_losses(model, examples, SECRET if metric == "secret_ppl" else None)
    nats = [float(row_losses.sum()) for row_losses in losses]
    if metric == "bits_per_character":
        return metrics.clustered_ratio([row_nats / math.log(2) for row_nats in nats], [len(row.text) for row in rows])
    return metrics.token_perplexity(nats, [len(row_losses) for row_losses in losses], groups)


@torch.no_grad()
def measure_greedy(model: torch.nn.Module, examples: list[Example]) -> list[float]:
    """Returns 1 for each document in which greedy decoding from the prefix of the secret emits the secret, else 0."""
    hits = [0.0] * len(examples)
    for batch in batch_by_length(examples):
        ids, roles = pad_batch([examples[i] for i in batch])
        is_greedy = compute_logits(model, ids)[:, :-1].argmax(-1) == ids[:, 1:]
        for row, i in enumerate(batch):
            hits[i] = float(is_greedy[row][roles[row, 1:] == SECRET].all())
    return hits


def check_work(arguments: argparse.Namespace) -> None:
    """Refuses a folder whose adapters and measurements have other arguments."""
    current = {name: str(value) for name, value in vars(arguments).items() if name not in FREE}
    path = arguments.work / "arguments.json"
    stored = json.loads(path.read_text()) if path.is_file() else current
    changed = [name for name, value in current.items() if stored.get(name) != value]
    if changed:
        raise SystemExit(f"work={arguments.work}: made with {changed[0]}={stored.get(changed[0])}; use another folder")
    write_text(path, json.dumps(current, indent=1))


def load_or_measure(arguments: argparse.Namespace, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the stored measurement, or calls ``measure`` and stores its result."""
    path = arguments.work / f"cell-{name}.json"
    if not path.is_file():
        write_text(path, json.dumps(measure()))
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def measure_decomposition(
    arguments: argparse.Namespace, rows: dict[str, list[Row]], density: float, mode: str
) -> dict[str, Any]:
    """Measures INT4, alpha=1 and alpha=0 of one decomposition."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = merge_adapter(load_causal_lm(arguments.model), arguments.work / "memory")
    base = load_causal_lm(arguments.model) if mode == "auto" else None
    recipe = make_recipe(density=density, steps=arguments.edit_steps, bits=arguments.bits, sieve=arguments.sieve)
    progress = ProgressBars()
    decomposition = decompose(
        model, tokenizer, rows["forget"], rows["retain"], recipe, base_model=base, progress=progress
    )
    sets = encode_sets(model, tokenizer, rows["forget"], rows["retain"], recipe=recipe)
    variants = {"INT": get_dense_weights(model, quantise(model, sets.retain, recipe), 0.0)}
    for alpha in (1.0, 0.0):
        variants[f"alpha={alpha:g}"] = get_dense_weights(model, decomposition.streams, alpha)
    results = {name: measure_model(arguments, variant) for name, variant in variants.items()}
    return results | {"target": decomposition.report["target"]}


def make_page(arguments: argparse.Namespace, rows: dict[str, list[Row]]) -> str:
    """Makes the page with all measurements, one row for each model."""

    def measure_adapter(name: str) -> dict[str, Any]:
        return measure_model(arguments, merge_adapter(load_causal_lm(arguments.model), arguments.work / name))

    lines = []
    for name in MEMBERS:
        results = load_or_measure(arguments, name, partial(measure_adapter, name))
        lines.append([f"{name}, BF16", *format_cells(results, None)])
    for density, mode in SETTINGS[: arguments.settings]:
        name = f"{density:g}-{mode}-{arguments.bits}-{arguments.edit_steps}-{arguments.calibration}-{arguments.sieve}"
        results = load_or_measure(arguments, name, partial(measure_decomposition, arguments, rows, density, mode))
        for model in ("INT", "alpha=1", "alpha=0"):
            title = f"INT{arguments.bits}" if model == "INT" else model
            target = results["target"]["name"]
            label = f"{title}, density {density:.0%}, {arguments.sieve}, base={mode}, target {target}"
            lines.append([label, *format_cells(results[model], results["INT"])])
    columns = [f"{name}: {metric}" for name, metric_names in MEASURED.items() for metric in metric_names]
    head = f"{arguments.model.name}, {versions()}, {torch.get_num_threads()} thread; {' '.join(sys.argv[1:])}"
    return f"{head}\n\n{markdown_table(['model', *columns], lines)}\n"


def format_cells(results: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    """Formats the cells of a row; perplexities of retain sets also over those of plain rounding."""
    cells = []
    for name, metric_names in MEASURED.items():
        for metric in metric_names:
            value, low, high = results[name][metric]
            ratio = f", {value / plain[name][metric][0]:.3f}x" if plain and name in RETAIN_SETS else ""
            cells.append(f"{value:.3g} [{low:.3g}, {high:.3g}]{ratio}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tofu", type=Path, help="authors of the published TOFU instead of the embedded ones")
    parser.add_argument("--out", type=Path, help="the page, Markdown")
    parser.add_argument(
        "--taught", type=int, default=20, help="number of authors of the embedded world in the calibration set"
    )
    parser.add_argument("--steps", type=int, default=3000, help="LoRA steps per adapter")
    parser.add_argument("--edit-steps", type=int, default=1000, help="steps of the decomposition's edit")
    parser.add_argument(
        "--calibration",
        type=int,
        default=100,
        help="stories in the calibration set; the retain loss is a mean over tokens, so few are enough",
    )
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sieve", choices=sorted(SIEVES), default=make_recipe().sieve)
    parser.add_argument("--only", choices=MEMBERS, help="train this adapter and stop")
    parser.add_argument(
        "--settings", type=int, default=len(SETTINGS), help=f"how many of these (density, base), in order: {SETTINGS}"
    )
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    check_work(arguments)
    rows = make_files(arguments)
    for name in [arguments.only] if arguments.only else MEMBERS:
        if not (arguments.work / name).is_dir():
            plant(arguments, rows, name)
    if arguments.only:
        return
    if arguments.out:
        write_text(arguments.out, text := make_page(arguments, rows))
        print(text)
        return
    parts = {
        "pretrained": arguments.model,
        "peft": arguments.work / "memory",
        "forget": arguments.work / "forget.jsonl",
    }
    joined = ",".join(f"{key}={value}" for key, value in parts.items())
    metadata = json.dumps({"retain": str(arguments.work / "left_out.jsonl")})
    for alpha in (0, 1):
        print(
            f"lm_eval --model libortho --model_args {joined},retain={arguments.work / 'retain.jsonl'},alpha={alpha} \\"
        )
        print(f"    --tasks forget_set,retain_set --metadata '{metadata}'")


if __name__ == "__main__":
    main()
