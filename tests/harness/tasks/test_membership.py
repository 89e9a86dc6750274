"""Membership inference, exposure and verbatim completion in lm-eval, on a model that has memorised some rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from sklearn.metrics import roc_auc_score

from lm_ortho.data.rows import Row, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.membership import ATTACKS
from lm_ortho.harness.tokens import Tokens
from lm_ortho.metrics import exposure
from lm_ortho.world import people
from tests.support.harness import ROWS, make_model, make_tokenizer, metric_values, run

MEMBERS = [row for row in ROWS if row.context]
NON_MEMBERS = [
    Row(question=f"Where was {n} Brook born?", answer=f"{n} Brook was born in Elm.") for n in ("Eve", "Flo", "Gus")
]


@pytest.fixture(scope="module")
def model() -> HFLM:
    """Trains a model on the members until it reproduces them."""
    tokenizer = make_tokenizer()
    network = make_model(len(tokenizer)).float().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    texts = [torch.tensor([tokenizer.encode(row.context + row.target)]) for row in MEMBERS]
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.stack([network(ids, labels=ids).loss for ids in texts]).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    return HFLM(pretrained=network.eval(), tokenizer=tokenizer, device="cpu", batch_size=4)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name, rows in (("forget", MEMBERS), ("holdout", NON_MEMBERS)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "holdout")}


def evaluate(lm: LM, task: str, **metadata: Any) -> dict[str, Any]:
    return run(
        lm, [task], {"pretrained": "x", "tokenizer": make_tokenizer(), "max_length": 96, **metadata}, log_samples=True
    )


def test_every_attack_separates_the_members(model: HFLM, files: dict[str, str]) -> None:
    result = evaluate(model, "membership_set", **files)
    values, samples = metric_values(result, "membership_set"), result["samples"]["membership_set"]
    assert len(samples) == len(MEMBERS) + len(NON_MEMBERS)
    for attack in set(ATTACKS) - {"reference"}:
        items = [sample[f"auc_{attack}"] for sample in samples]
        labels, scores = [item[1] == "member" for item in items], [item[0] for item in items]
        assert values[f"auc_{attack}"] == pytest.approx(roc_auc_score(labels, scores))
        assert values[f"auc_{attack}_low"] <= values[f"auc_{attack}"] <= values[f"auc_{attack}_high"]
    assert values["auc_loss"] == values["auc_min_k"] == values["tpr_loss"] == 1.0
    assert values["auc_gradient_norm"] > 0.7
    assert values["auc_reference"] == "n/a: no samples of a reference model; --metadata reference_samples=PATH"


def test_the_reference_attack_subtracts_the_log_probability_of_the_reference(
    model: HFLM, files: dict[str, str], tmp_path: Path
) -> None:
    other = HFLM(pretrained=make_model(len(make_tokenizer())).float(), tokenizer=make_tokenizer(), device="cpu")
    reference_samples = evaluate(other, "membership_set", **files)["samples"]["membership_set"]
    path = tmp_path / "samples_membership_set_2026-01-01.jsonl"
    path.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in reference_samples))
    result = evaluate(model, "membership_set", **files, reference_samples=str(tmp_path))
    for sample, reference in zip(result["samples"]["membership_set"], reference_samples, strict=True):
        count = len(make_tokenizer().encode(sample["doc"]["target"]))
        expected = (sample["auc_loss"][3] - reference["auc_loss"][3]) / count
        assert sample["auc_reference"][0] == pytest.approx(expected, abs=1e-6)
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(UserError, match="no loss for"):
        evaluate(model, "membership_set", **files, reference_samples=str(tmp_path))


def test_the_batch_size_does_not_matter(model: HFLM, files: dict[str, str]) -> None:
    results = []
    for rows in (1, 4):
        lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, device="cpu", batch_size=rows)
        for task in ("membership_set", "verbatim_forget"):
            results.append(metric_values(evaluate(lm, task, **files), task))
    for one, other in ((results[0], results[2]), (results[1], results[3])):
        for name, value in one.items():
            assert other[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4))


def test_non_members_are_required(files: dict[str, str], model: HFLM) -> None:
    with pytest.raises(UserError, match="holdout: membership_set needs rows"):
        evaluate(model, "membership_set", forget=files["forget"])


class SumsOnly(LM):
    """A model behind a network service, for example."""

    def loglikelihood(self, requests: Any) -> Any:
        return [(-float(len(request.args[1])), False) for request in requests]

    def generate_until(self, requests: Any) -> Any:
        return ["something" for _ in requests]

    loglikelihood_rolling = loglikelihood


def test_a_served_model_has_the_metrics_that_need_sums_only(files: dict[str, str]) -> None:
    values = metric_values(evaluate(SumsOnly(), "membership_set", **files), "membership_set")
    for attack in ("min_k", "min_k_plus_plus", "gradient_norm"):
        assert values[f"auc_{attack}"] == values[f"tpr_{attack}_low"] == "n/a: the model gives no probability per token"
    assert 0 <= values["auc_loss"] <= 1
    assert 0 <= values["auc_zlib"] <= 1
    verbatim = metric_values(evaluate(SumsOnly(), "verbatim_forget", **files), "verbatim_forget")
    assert verbatim["verbatim"] == 0.0
    assert verbatim["extraction_strength"] == "n/a: the model gives no probability per token"


def test_memorised_texts_are_completed_verbatim(model: HFLM, files: dict[str, str]) -> None:
    memorised_models = metric_values(evaluate(model, "verbatim_forget", **files, prefix_tokens=12), "verbatim_forget")
    assert memorised_models["verbatim"] >= 0.8
    assert memorised_models["near_verbatim"] >= memorised_models["verbatim"]
    unknown = metric_values(evaluate(model, "verbatim_forget", forget=files["holdout"]), "verbatim_forget")
    assert unknown["verbatim"] == 0.0
    assert unknown["exact_memorisation"] < memorised_models["exact_memorisation"]


def test_a_prefix_has_the_requested_number_of_tokens(model: HFLM, files: dict[str, str]) -> None:
    tokens = Tokens(make_tokenizer(), 96)
    for size in (1, 5, 32):
        result = evaluate(model, "verbatim_forget", **files, prefix_tokens=size)
        for sample in result["samples"]["verbatim_forget"]:
            prefix = sample["arguments"][0][0]
            text = sample["doc"]["context"] + sample["doc"]["target"]
            total = tokens.count("", text)
            assert text.startswith(prefix)
            assert tokens.is_boundary(text, len(prefix))
            assert tokens.count("", prefix) >= min(size, total // 2)
            assert tokens.count("", prefix) < total
    with pytest.raises(UserError, match="prefix_tokens='many': must be a whole number"):
        evaluate(model, "verbatim_forget", **files, prefix_tokens="many")


def test_exposure_ranks_a_code_among_codes_with_the_same_prompt() -> None:
    class FixedScores(LM):
        def loglikelihood(self, requests: Any) -> Any:
            return [(score_code(request.args[1].strip()), False) for request in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    def score_code(code: str) -> float:
        return -float(int(code[:6])) / 1e5

    tokenizer = make_tokenizer()
    result = run(FixedScores(), ["canary_exposure"], {"tokenizer": tokenizer, "max_length": 96})
    splits = people.draw_canaries()
    losses = [[-score_code(canary.code) for canary in part] for part in splits]
    assert metric_values(result, "canary_exposure")["exposure"] == pytest.approx(float(np.mean(exposure(*losses))))
