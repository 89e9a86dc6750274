#!/usr/bin/env python
"""Makes the embedded weights from nothing: base model, adapters, decomposed default, model card.

    python scripts/build_world.py            # everything that is missing, into the package
    python scripts/build_world.py --stage decomposed --force

Interrupted, it goes on where it stopped: finished stages are kept, the base model resumes at the last block.
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
    words, bars = tokenizer.build(), ProgressBars()
    model = train.train_base(work, words, lambda done, total, loss: bars("base", done, total, f"loss {loss:.3f}"))
    partial = out / "base.partial"
    model.to(dtype=torch.bfloat16).save_pretrained(partial)
    words.save_pretrained(partial)
    partial.replace(out / "base")
    (work / "base_state.pt").unlink()


def build_adapter(out: Path, work: Path, name: str) -> None:
    torch.set_num_threads(1)
    adapters.train(out / "base", tokenizer.build(), name, out / name, work, ProgressBars())


def build_decomposed(out: Path, threads: int) -> None:
    from lm_ortho import checkpoint
    from lm_ortho.pipeline import build
    from lm_ortho.pipeline.spec import ModelSpec, resolve

    torch.set_num_threads(threads)
    source = resolve(ModelSpec(fresh=True))
    partial = out / "decomposed.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model, words, meta = build.decompose_model(source, ProgressBars())
    checkpoint.save(partial, model, words, meta)
    partial.replace(out / "decomposed")


CARD = """# The embedded model and its adapters

Made by `python scripts/build_world.py` (seeds in `lm_ortho/world`); the figures below by its stage
`card`, {versions}. Licence Apache-2.0. All people, places and codes are invented.

Floating-point sums depend on the number of threads and on the CPU: a rebuild follows the same text and recipe, not the
same bits. Times on two cores of an AMD Zen 5 (BF16 products), stage by stage and beside other
work: base model 15 minutes; then, one thread each, memory 14 minutes beside 17 for the two references (from 11 for both
at once); decomposition 14 minutes with one thread beside another (8
with two threads undisturbed), model card 3.

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
    """Measures every embedded model and writes the table."""
    from lm_ortho import checkpoint
    from lm_ortho.finetune import load_causal_lm, merge_adapter
    from lm_ortho.harness.model import LibOrthoLM
    from lm_ortho.markdown import markdown_table, versions, write_text
    from lm_ortho.verdict.measurements import MEMORY_TASKS, REASONING_METRICS, REASONING_TASKS, measure
    from lm_ortho.verdict.models import plain_lm

    words = tokenizer.build()
    lines = list[list[str]]()

    def add(name: str, lm: object) -> None:
        found = measure(lm, words, MEMORY_TASKS)
        lines.append([name, *(f"{found.value(task, metric).value:.4g}" for _, task, metric in _CARD_COLUMNS)])

    for name in ("memory", "never_saw", "never_saw_2"):
        model = merge_adapter(load_causal_lm(out / "base"), out / name)
        lm = plain_lm(model, words)
        add(f"base + {name}", lm)
        if name == "memory":
            skills = measure(lm, words, REASONING_TASKS)
    model = checkpoint.load(out / "decomposed", torch.float32, "cpu")
    for alpha in (1.0, 0.0):
        add(f"decomposed, alpha={alpha:g}", LibOrthoLM(pretrained=model, tokenizer=words, alpha=alpha))
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


def adapters_side_by_side(out: Path, work: Path, names: list[str]) -> None:
    """Two processes with one thread each are faster than one with two: memory, and the two references."""
    lanes = [[name] for name in names if name == "memory"] + [[n for n in names if n != "memory"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = []
    for lane in filter(None, lanes):
        stages = [argument for name in lane for argument in ("--stage", name)]
        command = [sys.executable, __file__, "--out", str(out), "--work", str(work), "--here", *stages]
        running.append(subprocess.Popen(command, env=environment))
    if any(process.wait() for process in running):
        raise SystemExit("an adapter could not be trained; see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=world.WEIGHTS, help="where the weights go")
    parser.add_argument("--work", type=Path, default=Path("build/reference"), help="where the training state lies")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this stage (may be given again)")
    parser.add_argument("--force", action="store_true", help="make finished stages again")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    world.WEIGHTS = given.out
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = [s for s in STAGES if s in (given.stage or STAGES)]
    for stage in wanted if given.force else ():
        shutil.rmtree(given.out / stage, ignore_errors=True)
    missing = [s for s in wanted if s == "card" or not (given.out / s).is_dir()]
    began = time.perf_counter()
    if "base" in missing:
        build_base(given.out, given.work, given.threads)
    planted = [s for s in missing if s in adapters.SEEDS]
    if given.here:
        for name in planted:
            build_adapter(given.out, given.work, name)
        return
    if planted:
        adapters_side_by_side(given.out, given.work, planted)
    if "decomposed" in missing:
        build_decomposed(given.out, given.threads)
    if "card" in missing:
        write_card(given.out)
    print(f"{', '.join(missing)}: done in {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
