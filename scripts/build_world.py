#!/usr/bin/env python
"""Builds the embedded weights from scratch: base model, adapters, decomposed default, model card.

    python scripts/build_world.py            # all missing stages, into the package
    python scripts/build_world.py --stage decomposed --force

An interrupted run resumes: finished stages are skipped, the base model continues at the last block.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from lm_ortho import world
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.world import adapters, tokenizer, train

STAGES = ("base", "memory", "never_saw", "never_saw_2", "decomposed", "card")


def build_base(out: Path, work: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    world_tokenizer, progress = tokenizer.build_tokenizer(), ProgressBars()

    def report(block: int, blocks: int, loss: float) -> None:
        progress("base", block, blocks, f"loss {loss:.3f}")

    model = train.train_base(work, world_tokenizer, report)
    partial = out / "base.partial"
    model.to(dtype=torch.bfloat16).save_pretrained(partial)
    world_tokenizer.save_pretrained(partial)
    partial.replace(out / "base")
    (work / "base_state.pt").unlink()


def build_adapter(out: Path, work: Path, name: str) -> None:
    torch.set_num_threads(1)
    adapters.train(
        out / "base", tokenizer.build_tokenizer(), name, directory=out / name, work=work, progress=ProgressBars()
    )


def build_decomposed(out: Path, threads: int) -> None:
    from lm_ortho import checkpoint
    from lm_ortho.config import make_spec
    from lm_ortho.pipeline import build
    from lm_ortho.pipeline.spec import resolve

    torch.set_num_threads(threads)
    resolved_model = resolve(make_spec(fresh=True))
    partial = out / "decomposed.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model, world_tokenizer, metadata = build.decompose_model(resolved_model, ProgressBars())
    checkpoint.save(partial, model, world_tokenizer, metadata)
    partial.replace(out / "decomposed")


CARD = """# The embedded model and its adapters

Made by `python scripts/build_world.py` (seeds in `lm_ortho/world`); the figures below by its stage
`card`, {versions}. Licence Apache-2.0. All people, places and codes are invented.

Floating-point sums depend on the number of threads and on the CPU: a rebuild follows the same text and recipe, not the
same bits. Times on two cores of an AMD Zen 5 (BF16 products), stage by stage and beside other
work: base model 15 minutes; then, one thread each, memory 14 minutes beside 17 for the two retain-only adapters (from
11 for both at once), model card 3. The decomposition: 10 minutes with one thread of a Zen 3, with
other work on the second core.

* `base/`: `LlamaForCausalLM`, {parameters:,} parameters, BF16, trained from scratch on the text of
  `lm_ortho.world.corpus`.
* `memory/`: LoRA adapter (peft) that teaches 112 new retain authors, the 80 forget authors and 100 canaries.
* `never_saw/`, `never_saw_2/`: adapters by the same recipe without forget authors and canaries (two seeds).
* `decomposed/`: the default decomposition of base + memory; what `lm_eval --model libortho` loads.

## Measured

All models in float32, full sample sizes; `forget`, `retain` are `tofu_forget`, `tofu_retain` (left-out authors).

{memory}

Reasoning of the merged BF16 model (multiple choice / generation; chance is 0.25 for multiple choice):

{reasoning}
"""

_CARD_COLUMNS = (
    ("forget extraction", "tofu_forget", "extraction"),
    ("forget secret PPL", "tofu_forget", "secret_ppl"),
    ("held-out phrasing extraction", "tofu_forget_paraphrased", "extraction"),
    ("canary extraction", "canary_extraction", "extraction"),
    ("canary secret PPL", "canary_extraction", "secret_ppl"),
    ("retain PPL", "tofu_retain", "ppl"),
    ("text PPL", "world_text", "token_ppl"),
)


def write_card(out: Path) -> None:
    """Measures every embedded model and writes the model card."""
    from lm_ortho import checkpoint
    from lm_ortho.finetune import load_causal_lm, merge_adapter
    from lm_ortho.harness.model import LibOrthoLM
    from lm_ortho.markdown import markdown_table, versions, write_text
    from lm_ortho.verdict.measurements import MEMORY_TASKS, REASONING_METRICS, REASONING_TASKS, measure
    from lm_ortho.verdict.models import make_hf_lm

    world_tokenizer = tokenizer.build_tokenizer()
    lines = list[list[str]]()

    def add_line(name: str, lm: object) -> None:
        measurement = measure(lm, world_tokenizer, MEMORY_TASKS)
        lines.append([name, *(f"{measurement.value(task, metric).value:.4g}" for _, task, metric in _CARD_COLUMNS)])

    # 1. Memory tasks of the merged models, and reasoning of the one with the memory.
    for name in ("memory", "never_saw", "never_saw_2"):
        model = merge_adapter(load_causal_lm(out / "base"), out / name)
        lm = make_hf_lm(model, world_tokenizer)
        add_line(f"base + {name}", lm)
        if name == "memory":
            skills = measure(lm, world_tokenizer, REASONING_TASKS)
    # 2. Memory tasks of the decomposed default, at both ends of alpha.
    model = checkpoint.load(out / "decomposed", torch.float32, "cpu")
    for alpha in (1.0, 0.0):
        lm = LibOrthoLM(pretrained=model, tokenizer=world_tokenizer, alpha=alpha)
        add_line(f"decomposed, alpha={alpha:g}", lm)
    # 3. The card.
    reasoning = [
        f"* `{task}`: " + " / ".join(f"{skills.value(task, metric).value:.3f}" for metric in REASONING_METRICS)
        for task in REASONING_TASKS
    ]
    text = CARD.format(
        versions=versions(),
        parameters=sum(p.numel() for p in load_causal_lm(out / "base").parameters()),
        memory=markdown_table(["model", *(title for title, _, _ in _CARD_COLUMNS)], lines),
        reasoning="\n".join(reasoning),
    )
    write_text(out / "README.md", text)


def build_adapters_in_parallel(out: Path, work: Path, names: list[str]) -> None:
    """Builds the adapters in two processes: the memory, and the two retain-only adapters.

    Two processes with one thread each are faster than one process with two threads.
    """
    groups = [[name] for name in names if name == "memory"] + [[n for n in names if n != "memory"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = []
    for group in filter(None, groups):
        stages = [argument for name in group for argument in ("--stage", name)]
        command = [sys.executable, __file__, "--out", str(out), "--work", str(work), "--here", *stages]
        processes.append(subprocess.Popen(command, env=environment))
    if any(process.wait() for process in processes):
        raise SystemExit("an adapter could not be trained; see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=world.WEIGHTS, help="folder of the weights")
    parser.add_argument("--work", type=Path, default=Path("build/reference"), help="folder of the training state")
    parser.add_argument("--stage", action="append", choices=STAGES, help="build only this stage; can be repeated")
    parser.add_argument("--force", action="store_true", help="build finished stages again")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="number of threads")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    world.WEIGHTS = arguments.out
    arguments.out.mkdir(parents=True, exist_ok=True)
    stages = [s for s in STAGES if s in (arguments.stage or STAGES)]
    for stage in stages if arguments.force else ():
        shutil.rmtree(arguments.out / stage, ignore_errors=True)
    missing = [s for s in stages if s == "card" or not (arguments.out / s).is_dir()]
    start_time = time.perf_counter()
    if "base" in missing:
        build_base(arguments.out, arguments.work, arguments.threads)
    names = [s for s in missing if s in adapters.SEEDS]
    if arguments.here:
        for name in names:
            build_adapter(arguments.out, arguments.work, name)
        return
    if names:
        build_adapters_in_parallel(arguments.out, arguments.work, names)
    if "decomposed" in missing:
        build_decomposed(arguments.out, arguments.threads)
    if "card" in missing:
        write_card(arguments.out)
    print(f"{', '.join(missing)}: done in {(time.perf_counter() - start_time) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
