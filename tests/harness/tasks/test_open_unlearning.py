"""The metrics of TOFU in a chat template, against a computation of their definitions in float64.

The definitions are those of open-unlearning (src/data/utils.py, src/evals/metrics/*.py, commit d3d7cf9), written here
from token ids on, without anything of this package. The model has learnt a part of the rows, so that the values lie
between their ends.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]
from scipy.stats import hmean, ks_2samp
from torch import Tensor
from torch.nn import functional

from tests.support import tofu as tiny_tofu
from tests.support.chat import DATE, SYSTEM, make_chat_tokenizer
from tests.support.harness import make_model, metric_values, run

TASK, FIRST, LENGTH = "tofu_forget01", 5, 256
CHAT = {"apply_chat_template": True, "system_instruction": SYSTEM}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tofu.write(tmp_path_factory.mktemp("data") / "tofu")


def read(folder: Path, name: str, last: int | None = None) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return (rows[-last:] if last else rows)[:FIRST]


class Reference:
    """The metrics of a model: ids of the prompt, of the answer with its end, and sums over log-probabilities."""

    def __init__(self, tokenizer: Any, rows: list[dict[str, Any]], seed: int) -> None:
        self.tokenizer = tokenizer
        self.model = make_model(len(tokenizer), seed=seed).double()
        self.model.config.max_position_embeddings = LENGTH
        self._learn(rows)
        self.lm = HFLM(
            pretrained=self.model,
            tokenizer=tokenizer,
            device="cpu",
            batch_size=8,
            max_length=LENGTH,
            chat_template_args=DATE,
            softmax_dtype="float64",
        )

    def _learn(self, rows: list[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        self.model.float().train()
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=4e-3)
        ids, starts = zip(*(self.encode(row["question"], row["answer"]) for row in rows), strict=True)
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
        labels = torch.full_like(batch, -100)
        for number, (row, start) in enumerate(zip(ids, starts, strict=True)):
            labels[number, start : len(row)] = batch[number, start : len(row)]
        for _ in range(60):
            logits = self.model(batch).logits[:, :-1]
            functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
            optimiser.step()
            optimiser.zero_grad()
        self.model.double().eval()

    def encode(self, question: str, answer: str) -> tuple[list[int], int]:
        """Ids of the whole chat, and where the answer starts."""
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **DATE)
        chat.append({"role": "assistant", "content": answer})
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **DATE)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[-1] == self.tokenizer.eos_token_id
        return ids, len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def logp(self, question: str, answer: str) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of answer and end (tokens,), and whether it is the most likely one."""
        ids, start = self.encode(question, answer)
        logits = self.model(torch.tensor([ids])).logits[0, start - 1 : -1]
        targets = torch.tensor(ids[start:])
        return torch.log_softmax(logits, -1)[range(len(targets)), targets], logits.argmax(-1) == targets

    def loss(self, question: str, answer: str) -> float:
        return -float(self.logp(question, answer)[0].mean())

    @torch.no_grad()
    def generate(self, question: str) -> str:
        ids, start = self.encode(question, "")
        prompt, answer = ids[:start], list[int]()
        while len(answer) < LENGTH // 2:
            token = int(self.model(torch.tensor([prompt + answer])).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            answer.append(token)
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def ratio(self, row: dict[str, Any]) -> float:
        """P(wrong answers) / P(paraphrased answer)."""
        right = self.loss(row["question"], row.get("paraphrased_answer", row["answer"]))
        wrong = np.mean([self.loss(row["question"], answer) for answer in row["perturbed_answer"]])
        return math.exp(-wrong) / math.exp(-right)

    def min_k(self, row: dict[str, Any], share: float = 0.4) -> float:
        logp = np.sort(self.logp(row["question"], row["answer"])[0].numpy()[:-1])
        return float(logp[: max(1, int(len(logp) * share))].mean())


def words(text: str) -> list[str]:
    stem = PorterStemmer().stem
    return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


def rouge_recall(generated: str, answer: str) -> float:
    """Longest common subsequence of words, as a share of those of the answer."""
    one, two = words(generated), words(answer)
    table = np.zeros((len(one) + 1, len(two) + 1), dtype=int)
    for i, first in enumerate(one):
        for j, second in enumerate(two):
            table[i + 1, j + 1] = table[i, j] + 1 if first == second else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1] / len(two)


def extraction_strength(greedy: list[bool]) -> float:
    """1 - k / n for the shortest prefix of k tokens after which all tokens are greedy (k = n: none are)."""
    k = next(k for k in range(len(greedy) + 1) if all(greedy[k:]))
    return 1 - k / len(greedy)


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Reference, Reference]:
    """A model of all rows, and one that never saw the forget set."""
    tokenizer = make_chat_tokenizer()
    others = [*read(folder, "retain_perturbed"), *read(folder, "real_authors"), *read(folder, "world_facts")]
    forget = read(folder, "forget10_perturbed", last=40)
    return Reference(tokenizer, [*forget, *others], seed=0), Reference(tokenizer, others, seed=1)


def evaluate(reference: Reference, folder: Path, task: str, **metadata: Any) -> dict[str, Any]:
    metadata = {
        "tokenizer": reference.tokenizer,
        "max_length": LENGTH,
        "tofu_dir": str(folder),
        "tofu_first": FIRST,
        **metadata,
    }
    return run(reference.lm, [task], metadata, log_samples=True, **CHAT)


def test_every_metric_of_a_forget_set(models: tuple[Reference, Reference], folder: Path, tmp_path: Path) -> None:
    full, retain = models
    logs = tmp_path / f"samples_{TASK}_2026-01-01.jsonl"
    samples = evaluate(retain, folder, TASK)["samples"][TASK]
    logs.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in samples))
    values = metric_values(evaluate(full, folder, TASK, tofu_retain_samples=str(logs)), TASK)
    rows, holdout = read(folder, "forget10_perturbed", last=40), read(folder, "holdout01")
    # 1. Probability, truth ratio, forget quality.
    losses = np.array([full.loss(row["question"], row["answer"]) for row in rows])
    assert values["prob"] == pytest.approx(np.exp(-losses).mean(), rel=1e-9)
    assert 0.01 < values["prob"] < 0.99
    ratios, retain_ratios = (np.array([model.ratio(row) for row in rows]) for model in models)
    assert values["truth_ratio"] == pytest.approx(np.exp(np.log(ratios).mean()), rel=1e-9)
    assert values["forget_truth_ratio"] == pytest.approx(np.minimum(ratios, 1 / ratios).mean(), rel=1e-9)
    grid = np.concatenate([ratios, retain_ratios])
    shares = [(sample[:, None] <= grid).mean(0) for sample in (ratios, retain_ratios)]
    assert values["forget_ks"] == pytest.approx(np.abs(shares[0] - shares[1]).max())
    assert values["forget_quality"] == pytest.approx(ks_2samp(ratios, retain_ratios).pvalue)
    # 2. Generated answers.
    recalls = [rouge_recall(full.generate(row["question"]), row["answer"]) for row in rows]
    assert values["rougel_recall"] == pytest.approx(np.mean(recalls))
    assert values["rougel_recall"] > 0
    # 3. Token by token, without the end.
    greedy = [full.logp(row["question"], row["answer"])[1][:-1].tolist() for row in rows]
    assert values["exact_memorisation"] == pytest.approx(np.mean([np.mean(tokens) for tokens in greedy]))
    assert values["extraction_strength"] == pytest.approx(np.mean([extraction_strength(tokens) for tokens in greedy]))
    assert 0 < values["extraction_strength"] < values["exact_memorisation"] < 1
    # 4. Membership inference: how often a member is likelier than a row that nobody was taught.
    aucs = []
    for model in models:
        members, others = (np.array([model.min_k(row) for row in part]) for part in (rows, holdout))
        aucs.append(((members[:, None] > others) + 0.5 * (members[:, None] == others)).mean())
    expected = 100 * ((1 - aucs[0]) - (1 - aucs[1])) / (1 - aucs[1])
    assert values["priv_leak"] == pytest.approx(expected, rel=1e-6)


def test_model_utility(models: tuple[Reference, Reference], folder: Path) -> None:
    full, _ = models
    values = metric_values(evaluate(full, folder, "tofu_model_utility"), "tofu_model_utility")
    nine = []
    for part, name in (
        ("retain", "retain_perturbed"),
        *((n, f"{n}_perturbed") for n in ("real_authors", "world_facts")),
    ):
        rows = read(folder, name)
        probs = np.array([math.exp(-full.loss(row["question"], row["answer"])) for row in rows])
        if part != "retain":
            wrong = [sum(math.exp(-full.loss(row["question"], a)) for a in row["perturbed_answer"]) for row in rows]
            probs = probs / (probs + np.array(wrong))
        recalls = [rouge_recall(full.generate(row["question"]), row["answer"]) for row in rows]
        ratios = np.array([full.ratio(row) for row in rows])
        expected = [probs.mean(), np.mean(recalls), np.maximum(0, 1 - ratios).mean()]
        found = [values[f"{part}_{kind}"] for kind in ("prob", "rouge", "truth_ratio")]
        assert found == pytest.approx(expected, rel=1e-9)
        nine += expected
    assert all(number > 0 for number in nine)
    assert values["model_utility"] == pytest.approx(hmean(nine), rel=1e-9)
