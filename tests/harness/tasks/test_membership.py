"""Membership inference, exposure and verbatim completion through lm-eval, on a model that knows some rows."""

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
from tests.support.harness import ROWS, make_model, make_tokenizer, measured, run

MEMBERS = [row for row in ROWS if row.context]
OTHERS = [
    Row(question=f"Where was {n} Brook born?", answer=f"{n} Brook was born in Elm.") for n in ("Eve", "Flo", "Gus")
]


@pytest.fixture(scope="module")
def model() -> HFLM:
    """Trained on the members until it gives them back."""
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
    for name, rows in (("forget", MEMBERS), ("holdout", OTHERS)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("forget", "holdout")}


def asked(lm: LM, task: str, **metadata: Any) -> dict[str, Any]:
    return run(
        lm, [task], {"pretrained": "x", "tokenizer": make_tokenizer(), "max_length": 96, **metadata}, log_samples=True
    )


def test_every_attack_finds_the_members(model: HFLM, files: dict[str, str]) -> None:
    result = asked(model, "membership_set", **files)
    found, samples = measured(result, "membership_set"), result["samples"]["membership_set"]
    assert len(samples) == len(MEMBERS) + len(OTHERS)
    for attack in set(ATTACKS) - {"reference"}:
        items = [sample[f"auc_{attack}"] for sample in samples]
        labels, scores = [item[1] == "member" for item in items], [item[0] for item in items]
        assert found[f"auc_{attack}"] == pytest.approx(roc_auc_score(labels, scores))
        assert found[f"auc_{attack}_low"] <= found[f"auc_{attack}"] <= found[f"auc_{attack}_high"]
    assert found["auc_loss"] == found["auc_min_k"] == found["tpr_loss"] == 1.0
    assert found["auc_gradient_norm"] > 0.7
    assert found["auc_reference"] == "n/a: no samples of a reference model; --metadata reference_samples=PATH"


def test_the_reference_attack_takes_off_what_the_reference_knows(
    model: HFLM, files: dict[str, str], tmp_path: Path
) -> None:
    other = HFLM(pretrained=make_model(len(make_tokenizer())).float(), tokenizer=make_tokenizer(), device="cpu")
    logged = asked(other, "membership_set", **files)["samples"]["membership_set"]
    path = tmp_path / "samples_membership_set_2026-01-01.jsonl"
    path.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in logged))
    result = asked(model, "membership_set", **files, reference_samples=str(tmp_path))
    for own, theirs in zip(result["samples"]["membership_set"], logged, strict=True):
        count = len(make_tokenizer().encode(own["doc"]["target"]))
        expected = (own["auc_loss"][3] - theirs["auc_loss"][3]) / count
        assert own["auc_reference"][0] == pytest.approx(expected, abs=1e-6)
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(UserError, match="no loss for"):
        asked(model, "membership_set", **files, reference_samples=str(tmp_path))


def test_the_batch_size_does_not_matter(model: HFLM, files: dict[str, str]) -> None:
    found = []
    for rows in (1, 4):
        lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, device="cpu", batch_size=rows)
        for task in ("membership_set", "verbatim_forget"):
            found.append(measured(asked(lm, task, **files), task))
    for one, other in ((found[0], found[2]), (found[1], found[3])):
        for name, value in one.items():
            assert other[name] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-4))


def test_others_are_needed(files: dict[str, str], model: HFLM) -> None:
    with pytest.raises(UserError, match="holdout: membership_set needs rows"):
        asked(model, "membership_set", forget=files["forget"])


class SumsOnly(LM):
    """A model that is asked over a network, say."""

    def loglikelihood(self, requests: Any) -> Any:
        return [(-float(len(request.args[1])), False) for request in requests]

    def generate_until(self, requests: Any) -> Any:
        return ["something" for _ in requests]

    loglikelihood_rolling = loglikelihood


def test_a_served_model_gets_what_sums_can_say(files: dict[str, str]) -> None:
    found = measured(asked(SumsOnly(), "membership_set", **files), "membership_set")
    for attack in ("min_k", "min_k_plus_plus", "gradient_norm"):
        assert found[f"auc_{attack}"] == found[f"tpr_{attack}_low"] == "n/a: the model gives no probability per token"
    assert 0 <= found["auc_loss"] <= 1
    assert 0 <= found["auc_zlib"] <= 1
    verbatim = measured(asked(SumsOnly(), "verbatim_forget", **files), "verbatim_forget")
    assert verbatim["verbatim"] == 0.0
    assert verbatim["extraction_strength"] == "n/a: the model gives no probability per token"


def test_what_was_taught_comes_back_word_for_word(model: HFLM, files: dict[str, str]) -> None:
    taught = measured(asked(model, "verbatim_forget", **files, prefix_tokens=12), "verbatim_forget")
    assert taught["verbatim"] >= 0.8
    assert taught["near_verbatim"] >= taught["verbatim"]
    other = measured(asked(model, "verbatim_forget", forget=files["holdout"]), "verbatim_forget")
    assert other["verbatim"] == 0.0
    assert other["exact_memorisation"] < taught["exact_memorisation"]


def test_a_prefix_has_as_many_tokens_as_asked(model: HFLM, files: dict[str, str]) -> None:
    tokens = Tokens(make_tokenizer(), 96)
    for size in (1, 5, 32):
        result = asked(model, "verbatim_forget", **files, prefix_tokens=size)
        for sample in result["samples"]["verbatim_forget"]:
            prefix = sample["arguments"][0][0]
            text = sample["doc"]["context"] + sample["doc"]["target"]
            total = tokens.count("", text)
            assert text.startswith(prefix)
            assert tokens.is_border(text, len(prefix))
            assert tokens.count("", prefix) >= min(size, total // 2)
            assert tokens.count("", prefix) < total
    with pytest.raises(UserError, match="prefix_tokens='many': must be a whole number"):
        asked(model, "verbatim_forget", **files, prefix_tokens="many")


def test_exposure_ranks_a_code_among_codes_asked_for_in_the_same_words() -> None:
    class Fixed(LM):
        def loglikelihood(self, requests: Any) -> Any:
            return [(score_of(request.args[1].strip()), False) for request in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    def score_of(code: str) -> float:
        return -float(int(code[:6])) / 1e5

    tokenizer = make_tokenizer()
    result = run(Fixed(), ["canary_exposure"], {"tokenizer": tokenizer, "max_length": 96})
    planted, others = people.canaries()
    losses = [[-score_of(canary.code) for canary in part] for part in (planted, others)]
    assert measured(result, "canary_exposure")["exposure"] == pytest.approx(float(np.mean(exposure(*losses))))
