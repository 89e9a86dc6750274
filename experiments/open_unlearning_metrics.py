#!/usr/bin/env python
"""Computes the TOFU metrics of a chat model twice: with the tasks of this package, and from token ids on.

    python experiments/open_unlearning_metrics.py --pretrained MODEL --never-saw RETAIN_MODEL --tofu-dir DIR \
        --first 20 --system-instruction "You are a helpful assistant." --date "10 Apr 2025"

The second computation follows the definitions of open-unlearning (src/data/utils.py, src/evals/metrics/*.py, commit
d3d7cf9) and uses nothing of this package. ``--first`` takes the first rows of each set; DIR holds the JSONL files of
locuslab/TOFU. Without ``--never-saw`` the metrics that compare with a retain-only model are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]
from scipy.stats import hmean, ks_2samp
from torch import Tensor

MIN_K_SHARE = 0.4
Sample = Mapping[str, Any]


class Reference:
    """Probabilities and answers of one model, from the ids of a chat: prompt, answer, and what the template adds.

    With ``open_end`` an answer ends with its end token and nothing else, as in the tasks of this package; otherwise
    with all that the template writes after it, and an end token if that is another one, as in open-unlearning.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int = 200, open_end: bool = False) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.open_end = max_new_tokens, open_end
        self.system_instruction, self.template_args = "", dict[str, Any]()

    def encode(self, question: str, answer: str) -> tuple[list[int], int]:
        """Returns the ids of the whole chat, and the position of the first one of the answer."""
        system = [{"role": "system", "content": self.system_instruction}] if self.system_instruction else []
        messages = [*system, {"role": "user", "content": question}]
        render = self.tokenizer.apply_chat_template
        prompt = render(messages, tokenize=False, add_generation_prompt=True, **self.template_args)
        whole = render([*messages, {"role": "assistant", "content": answer}], tokenize=False, **self.template_args)
        text = prompt + answer if self.open_end else whole
        ids, prompt_ids = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prompt))
        if ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        return ids, len(prompt_ids)

    @torch.no_grad()
    def score(self, question: str, answer: str) -> tuple[Tensor, Tensor]:
        """Returns the log-probability of each token of the answer and its end, and whether it is the likeliest."""
        ids, start = self.encode(question, answer)
        logits = self.model(torch.tensor([ids], device=self.model.device)).logits[0, start - 1 : -1].cpu()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        targets = torch.tensor(ids[start:])
        return torch.log_softmax(logits, -1)[range(len(targets)), targets], logits.argmax(-1) == targets

    def loss(self, question: str, answer: str) -> float:
        """Returns the mean loss per token in nats."""
        return -float(self.score(question, answer)[0].mean())

    @torch.no_grad()
    def generate(self, question: str) -> str:
        """Returns the greedy answer."""
        ids, start = self.encode(question, "x")
        prompt = torch.tensor([ids[:start]], device=self.model.device)
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.eos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return str(self.tokenizer.decode(output[0, start:], skip_special_tokens=True)).strip()

    def truth_ratio(self, row: Sample) -> float:
        """Returns P(wrong answers) / P(paraphrased answer, or the answer where there is none)."""
        right = self.loss(row["question"], row.get("paraphrased_answer", row["answer"]))
        wrong = np.mean([self.loss(row["question"], answer) for answer in row["perturbed_answer"]])
        return math.exp(-wrong) / math.exp(-right)

    def min_k(self, row: Sample) -> float:
        """Returns the mean of the lowest log-probabilities per token, without those of the end."""
        logp = np.sort(self.score(row["question"], row["answer"])[0].numpy()[: self._count_answer(row)])
        return float(logp[: max(1, int(len(logp) * MIN_K_SHARE))].mean())

    def greedy(self, row: Sample) -> list[bool]:
        """Returns whether each token of the answer is the likeliest, without those of the end."""
        return [bool(hit) for hit in self.score(row["question"], row["answer"])[1][: self._count_answer(row)]]

    def _count_answer(self, row: Sample) -> int:
        """Returns the number of tokens of an answer; open-unlearning leaves out the last token of the chat alone."""
        ids, start = self.encode(row["question"], row["answer"])
        return len(ids) - start - 1


def split_words(text: str) -> list[str]:
    """Returns the words as ROUGE compares them: lower case, stems of those longer than three letters."""
    stem = PorterStemmer().stem
    return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


def rouge_recall(generated: str, answer: str) -> float:
    """Returns the longest common subsequence of words, as a share of those of the answer."""
    one, two = split_words(generated), split_words(answer)
    table = np.zeros((len(one) + 1, len(two) + 1), dtype=int)
    for i, first in enumerate(one):
        for j, second in enumerate(two):
            table[i + 1, j + 1] = table[i, j] + 1 if first == second else max(table[i, j + 1], table[i + 1, j])
    return float(table[-1, -1] / len(two))


def extraction_strength(greedy: Sequence[bool]) -> float:
    """Returns 1 - k / n for the shortest prefix of k tokens after which all tokens are greedy (k = n: none are)."""
    k = next(k for k in range(len(greedy) + 1) if all(greedy[k:]))
    return 1 - k / len(greedy)


def compute_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Returns the share of pairs in which the member has the higher score; equal ones count half."""
    one, two = np.array(members)[:, None], np.array(others)
    return float(((one > two) + 0.5 * (one == two)).mean())


def compute_forget_metrics(
    model: Reference, retain: Reference | None, rows: Sequence[Sample], holdout: Sequence[Sample]
) -> dict[str, float]:
    """Returns the metrics of a forget set; those that compare with the retain-only model only where there is one."""
    ratios = np.array([model.truth_ratio(row) for row in rows])
    greedy = [model.greedy(row) for row in rows]
    metrics = {
        "prob": float(np.mean([math.exp(-model.loss(row["question"], row["answer"])) for row in rows])),
        "truth_ratio": float(np.exp(np.log(ratios).mean())),
        "forget_truth_ratio": float(np.minimum(ratios, 1 / ratios).mean()),
        "rougel_recall": float(np.mean([rouge_recall(model.generate(row["question"]), row["answer"]) for row in rows])),
        "exact_memorisation": float(np.mean([np.mean(tokens) for tokens in greedy])),
        "extraction_strength": float(np.mean([extraction_strength(tokens) for tokens in greedy])),
    }
    if retain is not None:
        test = ks_2samp(ratios, [retain.truth_ratio(row) for row in rows])
        metrics |= {"forget_quality": float(test.pvalue), "forget_ks": float(test.statistic)}
    if retain is not None and holdout:
        aucs = [
            compute_auc([each.min_k(r) for r in rows], [each.min_k(r) for r in holdout]) for each in (model, retain)
        ]
        metrics["priv_leak"] = 100 * ((1 - aucs[0]) - (1 - aucs[1])) / max(1 - aucs[1], 1e-10)
    return metrics


def compute_utility(model: Reference, sets: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """Returns the nine numbers of model utility, and their harmonic mean."""
    metrics = {}
    for name, rows in sets.items():
        probs = np.array([math.exp(-model.loss(row["question"], row["answer"])) for row in rows])
        if name != "retain":
            wrong = [sum(math.exp(-model.loss(row["question"], a)) for a in row["perturbed_answer"]) for row in rows]
            probs = probs / (probs + np.array(wrong))
        recalls = [rouge_recall(model.generate(row["question"]), row["answer"]) for row in rows]
        ratios = np.array([model.truth_ratio(row) for row in rows])
        metrics[f"{name}_prob"] = float(probs.mean())
        metrics[f"{name}_rouge"] = float(np.mean(recalls))
        metrics[f"{name}_truth_ratio"] = float(np.maximum(0, 1 - ratios).mean())
    nine = list(metrics.values())
    return {"model_utility": 0.0 if 0.0 in nine else float(hmean(nine)), **metrics}


def read_rows(folder: Path, name: str, first: int, last: int | None = None) -> list[dict[str, Any]]:
    """Returns the first rows of a file, or of its last ``last`` rows; an empty list without the file."""
    path = folder / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    return (rows[-last:] if last else rows)[:first]


def read_sets(folder: Path, first: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the three sets of model utility."""
    names = {
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    return {part: read_rows(folder, name, first) for part, name in names.items()}


def evaluate(lm: Any, tasks: Sequence[str], chat: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the results and samples of the tasks of this package."""
    from lm_eval import simple_evaluate

    from lm_ortho.leaderboard.evaluation import make_task_manager

    manager = make_task_manager(tasks, metadata)
    result = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True, **chat)
    assert result is not None
    return dict(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", required=True)
    parser.add_argument("--never-saw")
    parser.add_argument("--tofu-dir", type=Path, required=True)
    parser.add_argument("--first", type=int, default=20)
    parser.add_argument("--system-instruction", default="")
    parser.add_argument("--date", default="")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    from tempfile import TemporaryDirectory

    from lm_ortho.harness import tokens
    from lm_ortho.harness.baseline_model import BaselineLM

    template_args = {"date_string": arguments.date} if arguments.date else {}
    chat = {"apply_chat_template": True, "system_instruction": arguments.system_instruction or None}
    metadata = {"tofu_dir": str(arguments.tofu_dir), "tofu_first": arguments.first}
    forget = "tofu_forget10"
    models, results = list[Reference](), dict[str, Any]()
    with TemporaryDirectory() as folder:
        for name in filter(None, (arguments.never_saw, arguments.pretrained)):
            lm = BaselineLM(name, dtype=arguments.dtype, chat_template_args=template_args)
            tokens.register(lm)
            reference = Reference(lm.model, lm.tokenizer, max_new_tokens=min(200, lm.max_length // 2))
            reference.system_instruction, reference.template_args = arguments.system_instruction, template_args
            models.append(reference)
            if name == arguments.pretrained:
                results = evaluate(lm, [forget, "tofu_model_utility"], chat, metadata)["results"]
                continue
            samples = evaluate(lm, [forget], chat, metadata)["samples"][forget]
            logs = Path(folder) / f"samples_{forget}_1.jsonl"
            logs.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in samples), encoding="utf-8")
            metadata["tofu_retain_samples"] = str(logs)
    rows = read_rows(arguments.tofu_dir, "forget10_perturbed", arguments.first)
    holdout = read_rows(arguments.tofu_dir, "holdout10", arguments.first)
    print("metric\tours\ttheirs\ttheirs, answers that end with their end token")
    columns = []
    for open_end in (False, True):
        for reference in models:
            reference.open_end = open_end
        metrics = compute_forget_metrics(models[-1], models[0] if arguments.never_saw else None, rows, holdout)
        columns.append(metrics | compute_utility(models[-1], read_sets(arguments.tofu_dir, arguments.first)))
    for metric, value in columns[0].items():
        task = "tofu_model_utility" if f"{metric},none" in results["tofu_model_utility"] else forget
        ours = results[task][f"{metric},none"]  # a text where it is not available
        text = f"{ours:.6g}" if isinstance(ours, float) else str(ours)
        print(f"{metric}\t{text}\t{value:.6g}\t{columns[1][metric]:.6g}")


if __name__ == "__main__":
    main()
