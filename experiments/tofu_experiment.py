#!/usr/bin/env python
"""Runs TOFU on a Llama trained for it: the full model, its retain-only model, and the decomposed full model.

    python experiments/tofu_experiment.py --tofu tofu/ --text stories.txt --text wiki.txt --work W --out page.md

A base model is trained from scratch on ``--text``; all its weights are then fine-tuned on the 4000 questions of
``full``, and those of a copy on the 3600 of ``retain90``. The first is decomposed to forget ``forget10``, with the base
model and with calibration rows that exclude the retain questions of the measurement. The tasks are ``tofu_forget10``
and ``tofu_model_utility``. Finished stages are stored in ``--work``; ``--only`` runs one of them, so that ``full`` and
``retain90`` can be trained in parallel.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_ortho.data import Row, read_rows, write_rows
from lm_ortho.data.encoding import encode
from lm_ortho.finetune import FinetunePlan, load_causal_lm, train_full
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.plugin.bridges import find_tasks_dir
from lm_ortho.runtime.progress import ProgressBars

END = "<|end|>"
MEASURED_RETAIN = 400
"""Rows of ``retain_perturbed``: the first ones of ``full``. No calibration set contains them."""
TASKS = ("tofu_forget10", "tofu_model_utility")
COLUMNS = (
    ("tofu_forget10", "ppl"),
    ("tofu_forget10", "prob"),
    ("tofu_forget10", "rougel_recall"),
    ("tofu_forget10", "extraction_strength"),
    ("tofu_forget10", "forget_truth_ratio"),
    ("tofu_forget10", "forget_quality"),
    ("tofu_forget10", "forget_ks"),
    ("tofu_model_utility", "model_utility"),
    ("tofu_model_utility", "retain_prob"),
    ("tofu_model_utility", "retain_rouge"),
    ("tofu_model_utility", "retain_truth_ratio"),
)
STAGES = ("base", "full", "retain90")


def read_paragraphs(files: list[Path], max_characters: int = 700) -> list[Row]:
    """Reads text in pieces of full sentences that fit in a short context."""
    rows = list[Row]()
    for file in files:
        for part in re.split(r"<\|endoftext\|>|\n\s*\n| = .{1,80} = \n", file.read_text(encoding="utf-8")):
            piece = ""
            for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", part).strip()):
                if len(piece) + len(sentence) > max_characters and piece:
                    rows.append(Row(text=piece))
                    piece = ""
                piece = f"{piece} {sentence}".strip()[:max_characters]
            if len(piece) > 80:
                rows.append(Row(text=piece))
    return rows


def make_tokenizer(arguments: argparse.Namespace, text: list[Row]) -> None:
    """Trains a byte-level BPE on the text and on TOFU, and saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [*text, *read_rows(arguments.tofu / "full.jsonl", "tofu")]
    tokenizer.train_from_iterator((row.context + row.target for row in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=arguments.context
    )
    fast.save_pretrained(arguments.work / "tokenizer")


def make_model(arguments: argparse.Namespace, tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 64,
        max_position_embeddings=arguments.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train_stage(arguments: argparse.Namespace, stage: str, text: list[Row]) -> None:
    """Trains one of the three models and saves it in BF16; a state file lets an interrupted training resume."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.work / "tokenizer")
    if stage == "base":
        start: torch.nn.Module = make_model(arguments, tokenizer)
        rows, steps, lr = text, arguments.base_steps, arguments.base_lr
    else:
        start = load_causal_lm(arguments.work / "base")
        rows, steps, lr = read_rows(arguments.tofu / f"{stage}.jsonl", "tofu"), arguments.steps, arguments.lr
        # The same number of passes for both models; a little text, so that the model keeps its other skills.
        steps = round(steps * len(rows) / 4000)
        rows = rows + text[:: max(1, len(text) // (len(rows) // 10))]
    examples = encode(tokenizer, rows, arguments.context)
    plan = FinetunePlan(steps=steps, rows=arguments.rows, lr=lr, seed=arguments.seed)
    state = arguments.work / f"{stage}.state"
    model: Any = train_full(start, examples, plan, ProgressBars(), stage=stage, state=state).to(torch.bfloat16)
    partial = arguments.work / f"{stage}.partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(arguments.work / stage)
    state.unlink()


def write_calibration(arguments: argparse.Namespace, text: list[Row]) -> dict[str, str]:
    """Writes the files of the decomposition: forget10, and retain rows that are not measured, with text."""
    retain = read_rows(arguments.tofu / "retain90.jsonl", "tofu")[MEASURED_RETAIN:]
    stride = max(1, len(retain) // arguments.retain_rows)
    rows = retain[::stride] + text[:: max(1, len(text) // (arguments.retain_rows // 3))]
    write_rows(arguments.work / "retain.jsonl", rows)
    write_rows(arguments.work / "forget.jsonl", read_rows(arguments.tofu / "forget10.jsonl", "tofu"))
    return {name: str(arguments.work / f"{name}.jsonl") for name in ("forget", "retain")}


def measure(arguments: argparse.Namespace, name: str, lm: Any) -> dict[str, Any]:
    """Evaluates both tasks; stores the samples of the retain-only model, with which the others are compared."""
    metadata = {
        "tofu_dir": str(arguments.tofu),
        "pretrained": str(arguments.work / "full"),
        "max_length": arguments.context,
    }
    logs = arguments.work / "logs"
    if arguments.first:
        metadata["tofu_first"] = str(arguments.first)
    if name != "retain90":
        metadata["tofu_retain_samples"] = str(logs)
    manager = TaskManager(include_defaults=False, include_path=str(find_tasks_dir()), metadata=metadata)
    result = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)
    assert result is not None
    if name == "retain90":
        logs.mkdir(exist_ok=True)
        lines = (json.dumps(sample, default=str) + "\n" for sample in result["samples"][TASKS[0]])
        write_text(logs / f"samples_{TASKS[0]}_twin.jsonl", "".join(lines))
    return dict(result["results"])


def load_plain(arguments: argparse.Namespace, name: str) -> HFLM:
    """Loads one of the trained models in lm-eval's own class."""
    return HFLM(pretrained=str(arguments.work / name), dtype="float32", device="cpu", batch_size=16)


def load_decomposed(arguments: argparse.Namespace, sets: dict[str, str], **options: Any) -> LibOrthoLM:
    """Decomposes ``full``, or takes it from the cache."""
    return LibOrthoLM(
        pretrained=str(arguments.work / "full"),
        base=str(arguments.work / "base"),
        dtype="float32",
        device="cpu",
        forget=sets["forget"],
        retain=sets["retain"],
        batch_size=16,
        steps=arguments.edit_steps,
        force=arguments.first is not None,  # a model of a trial run knows nothing
        **options,
    )


def measure_all(arguments: argparse.Namespace, text: list[Row]) -> dict[str, dict[str, Any]]:
    """Measures every model, the retain-only model first, and stores each result as JSON."""
    sets, results = write_calibration(arguments, text), dict[str, dict[str, Any]]()

    def load_or_measure(name: str, load_model: Any) -> None:
        path = arguments.work / f"result-{name}.json"
        if not path.is_file():
            write_text(path, json.dumps(measure(arguments, name.partition(",")[0], load_model())))
        results[name] = json.loads(path.read_text())

    load_or_measure("retain90", lambda: load_plain(arguments, "retain90"))
    load_or_measure("full", lambda: load_plain(arguments, "full"))
    for density in arguments.density:
        for alpha in (1.0, 0.0):
            name = f"alpha={alpha:g}, density {density:g}, {arguments.edit_steps} steps"
            load_or_measure(name, lambda d=density, a=alpha: load_decomposed(arguments, sets, density=d, alpha=a))
    return results


def make_page(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """Makes the page: a row per model, value and interval per metric."""
    lines = []
    for name, result in results.items():
        lines.append([name, *(format_value(result[task], metric) for task, metric in COLUMNS)])
    size = sum(parameter.numel() for parameter in load_causal_lm(arguments.work / "base").parameters())
    head = f"{size / 1e6:.1f} M parameters, {versions()}, {torch.get_num_threads()} thread; {' '.join(sys.argv[1:])}"
    return f"{head}\n\n{markdown_table(['model', *(metric for _, metric in COLUMNS)], lines)}\n"


def format_value(values: dict[str, Any], metric: str) -> str:
    """Formats a value with its interval, or the reason why there is none."""
    value, low, high = (values.get(f"{metric}{end},none") for end in ("", "_low", "_high"))
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tofu", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True, help="plain text; can be repeated")
    parser.add_argument("--out", type=Path, help="the page, Markdown")
    parser.add_argument("--only", choices=STAGES, help="train this model and stop")
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--rows", type=int, default=16, help="rows per step")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--base-lr", type=float, default=1.5e-3)
    parser.add_argument(
        "--steps", type=int, default=5000, help="steps on full; retain90 has fewer, for the same number of passes"
    )
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--density", type=float, action="append", help="density; can be repeated (default 0.01 and 0.02)"
    )
    parser.add_argument("--retain-rows", type=int, default=900, help="retain rows in the calibration set")
    parser.add_argument("--edit-steps", type=int, default=1000, help="steps of the decomposition's edit")
    parser.add_argument("--first", type=int, help="number of rows of each measured set, for a trial run")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.density = arguments.density or [0.01, 0.02]
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    text = read_paragraphs(arguments.text)
    if not (arguments.work / "tokenizer").is_dir():
        make_tokenizer(arguments, text)
    for stage in [arguments.only] if arguments.only else STAGES:
        if not (arguments.work / stage).is_dir():
            train_stage(arguments, stage, text)
    if arguments.only:
        return
    page = make_page(arguments, measure_all(arguments, text))
    if arguments.out:
        write_text(arguments.out, page)
    print(page)


if __name__ == "__main__":
    main()
