#!/usr/bin/env python
"""The whole of TOFU in a Llama trained for it: full, its retain-only twin, and what alpha makes of the former.

    python experiments/tofu_experiment.py --tofu tofu/ --text stories.txt --text wiki.txt --work W --out page.md

A base model is trained from nothing on ``--text``; all weights of it are then fine-tuned on the 4000 questions of
``full``, and of a copy on the 3600 of ``retain90``. The first is decomposed to forget ``forget10``, with the base model
known and with calibration rows that no retain question of the measurement is among. Measured are the tasks
``tofu_forget10`` and ``tofu_model_utility``. Finished stages are kept in ``--work``; ``--only`` makes one of them, so
that ``full`` and ``retain90`` can be trained side by side.
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
from lm_ortho.plugin.bridges import tasks_dir
from lm_ortho.runtime.progress import ProgressBars

END = "<|end|>"
MEASURED_RETAIN = 400
"""Rows of ``retain_perturbed``: the first of ``full``. No calibration shows them."""
TASKS = ("tofu_forget10", "tofu_model_utility")
SHOWN = (
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


def paragraphs(files: list[Path], most: int = 700) -> list[Row]:
    """Text in pieces of whole sentences that a short context holds."""
    rows = list[Row]()
    for file in files:
        for part in re.split(r"<\|endoftext\|>|\n\s*\n| = .{1,80} = \n", file.read_text(encoding="utf-8")):
            piece = ""
            for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", part).strip()):
                if len(piece) + len(sentence) > most and piece:
                    rows.append(Row(text=piece))
                    piece = ""
                piece = f"{piece} {sentence}".strip()[:most]
            if len(piece) > 80:
                rows.append(Row(text=piece))
    return rows


def make_tokenizer(given: argparse.Namespace, text: list[Row]) -> None:
    """A byte-level BPE of the text and of TOFU."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=given.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [*text, *read_rows(given.tofu / "full.jsonl", "tofu")]
    tokenizer.train_from_iterator((row.context + row.target for row in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=given.context
    )
    fast.save_pretrained(given.work / "tokenizer")


def new_model(given: argparse.Namespace, tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden,
        intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        num_key_value_heads=given.hidden // 64,
        max_position_embeddings=given.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train(given: argparse.Namespace, stage: str, text: list[Row]) -> None:
    """One of the three models, saved in BF16; a state file keeps an interrupted training."""
    tokenizer = AutoTokenizer.from_pretrained(given.work / "tokenizer")
    if stage == "base":
        start: torch.nn.Module = new_model(given, tokenizer)
        rows, steps, lr = text, given.base_steps, given.base_lr
    else:
        start = load_causal_lm(given.work / "base")
        rows, steps, lr = read_rows(given.tofu / f"{stage}.jsonl", "tofu"), given.steps, given.lr
        # as many passes over its rows for both; a little text, so that the rest of the model stays what it is
        steps = round(steps * len(rows) / 4000)
        rows = rows + text[:: max(1, len(text) // (len(rows) // 10))]
    examples = encode(tokenizer, rows, given.context)
    plan = FinetunePlan(steps=steps, rows=given.rows, lr=lr, seed=given.seed)
    state = given.work / f"{stage}.state"
    model: Any = train_full(start, examples, plan, ProgressBars(), stage, state).to(torch.bfloat16)
    partial = given.work / f"{stage}.partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(given.work / stage)
    state.unlink()


def calibration(given: argparse.Namespace, text: list[Row]) -> dict[str, str]:
    """The files of the decomposition: forget10, and retain rows that are not measured, with text."""
    retain = read_rows(given.tofu / "retain90.jsonl", "tofu")[MEASURED_RETAIN:]
    every = max(1, len(retain) // given.retain_rows)
    rows = retain[::every] + text[:: max(1, len(text) // (given.retain_rows // 3))]
    write_rows(given.work / "retain.jsonl", rows)
    write_rows(given.work / "forget.jsonl", read_rows(given.tofu / "forget10.jsonl", "tofu"))
    return {name: str(given.work / f"{name}.jsonl") for name in ("forget", "retain")}


def measure(given: argparse.Namespace, name: str, lm: Any) -> dict[str, Any]:
    """The results of both tasks; samples are logged for the twin, which the others are compared with."""
    metadata = {"tofu_dir": str(given.tofu), "pretrained": str(given.work / "full"), "max_length": given.context}
    logs = given.work / "logs"
    if given.first:
        metadata["tofu_first"] = str(given.first)
    if name != "retain90":
        metadata["tofu_retain_samples"] = str(logs)
    manager = TaskManager(include_defaults=False, include_path=str(tasks_dir()), metadata=metadata)
    result = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True)
    assert result is not None
    if name == "retain90":
        logs.mkdir(exist_ok=True)
        lines = (json.dumps(sample, default=str) + "\n" for sample in result["samples"][TASKS[0]])
        write_text(logs / f"samples_{TASKS[0]}_twin.jsonl", "".join(lines))
    return dict(result["results"])


def plain(given: argparse.Namespace, name: str) -> HFLM:
    """One of the trained models, as lm-eval measures it."""
    return HFLM(pretrained=str(given.work / name), dtype="float32", device="cpu", batch_size=16)


def dual(given: argparse.Namespace, sets: dict[str, str], **options: Any) -> LibOrthoLM:
    """The decomposed ``full``; alpha is set later."""
    return LibOrthoLM(
        pretrained=str(given.work / "full"),
        base=str(given.work / "base"),
        dtype="float32",
        device="cpu",
        forget=sets["forget"],
        retain=sets["retain"],
        batch_size=16,
        steps=given.edit_steps,
        **options,
    )


def results(given: argparse.Namespace, text: list[Row]) -> dict[str, dict[str, Any]]:
    """What every model measures, kept as JSON one by one; the twin comes first."""
    sets, found = calibration(given, text), dict[str, dict[str, Any]]()

    def kept(name: str, make: Any) -> None:
        path = given.work / f"result-{name}.json"
        if not path.is_file():
            write_text(path, json.dumps(measure(given, name.partition(",")[0], make())))
        found[name] = json.loads(path.read_text())

    kept("retain90", lambda: plain(given, "retain90"))
    kept("full", lambda: plain(given, "full"))
    for density in given.density:
        for alpha in (1.0, 0.0):
            name = f"alpha={alpha:g}, density {density:g}, {given.edit_steps} steps"
            kept(name, lambda d=density, a=alpha: dual(given, sets, density=d, alpha=a))
    return found


def page(given: argparse.Namespace, found: dict[str, dict[str, Any]]) -> str:
    """A row per model, value and interval per metric."""
    lines = [[name, *(shown(result[task], metric) for task, metric in SHOWN)] for name, result in found.items()]
    size = sum(parameter.numel() for parameter in load_causal_lm(given.work / "base").parameters())
    head = f"{size / 1e6:.1f} M parameters, {versions()}, {torch.get_num_threads()} thread; {' '.join(sys.argv[1:])}"
    return f"{head}\n\n{markdown_table(['model', *(metric for _, metric in SHOWN)], lines)}\n"


def shown(values: dict[str, Any], metric: str) -> str:
    """A value with its interval, or why there is none."""
    value, low, high = (values.get(f"{metric}{end},none") for end in ("", "_low", "_high"))
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tofu", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True, help="plain text; several times")
    parser.add_argument("--out", type=Path, help="the page, Markdown")
    parser.add_argument("--only", choices=STAGES, help="train this model and stop")
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=384)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--base-lr", type=float, default=1.5e-3)
    parser.add_argument("--steps", type=int, default=5000, help="steps on full; fewer on retain90, as many passes")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--density", type=float, action="append", help="several times; default 0.01 and 0.02")
    parser.add_argument("--retain-rows", type=int, default=900, help="retain rows of the calibration")
    parser.add_argument("--edit-steps", type=int, default=1000, help="steps of the decomposition's edit")
    parser.add_argument("--first", type=int, help="rows of each measured set, to try it out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.density = given.density or [0.01, 0.02]
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    text = paragraphs(given.text)
    if not (given.work / "tokenizer").is_dir():
        make_tokenizer(given, text)
    for stage in [given.only] if given.only else STAGES:
        if not (given.work / stage).is_dir():
            train(given, stage, text)
    if given.only:
        return
    text_of_page = page(given, results(given, text))
    if given.out:
        write_text(given.out, text_of_page)
    print(text_of_page)


if __name__ == "__main__":
    main()
