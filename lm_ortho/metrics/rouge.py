"""ROUGE of generated answers, as the benchmarks of unlearning use it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple


class Rouge(NamedTuple):
    """Shares in [0, 1]; recall is of the words of the true answer."""

    rouge1_recall: float
    rougel_recall: float
    rougel_f1: float


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rouge(said: str, true: str) -> Rouge:
    """ROUGE-1 and ROUGE-L of a generated text against the true one, on stemmed words.

    The rouge-score package with the stemmer, as TOFU (arXiv 2401.06121) and MUSE (arXiv 2407.06460) publish it.
    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    scores = _scorer().score(true, said)
    return Rouge(scores["rouge1"].recall, scores["rougeL"].recall, scores["rougeL"].fmeasure)
