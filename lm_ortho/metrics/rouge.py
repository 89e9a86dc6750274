"""ROUGE scores of generated answers, as unlearning benchmarks use them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple


class Rouge(NamedTuple):
    """ROUGE scores in [0, 1]; recall is the share of the words of the true answer."""

    rouge1_recall: float
    rougel_recall: float
    rougel_f1: float


@cache
def _make_scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)


def rouge(generated: str, true: str, stemmer: bool = True) -> Rouge:
    """Returns ROUGE-1 and ROUGE-L of a generated text against the true one, by the rouge-score package.

    TOFU (arXiv 2401.06121) compares stems of words, MUSE (arXiv 2407.06460) the words themselves. Source: Lin 2004,
    ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    scores = _make_scorer(stemmer).score(true, generated)
    return Rouge(scores["rouge1"].recall, scores["rougeL"].recall, scores["rougeL"].fmeasure)
