"""LibOrthoLM and the tasks on a tiny random model, against plain PyTorch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lm_ortho import checkpoint, metrics
from lm_ortho.data.rows import Row, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness import tokens
from lm_ortho.harness.batching import _group_by_split
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.harness.tasks import aggregation
from lm_ortho.harness.tasks.datasets import documents
from lm_ortho.harness.tokens import Tokens
from lm_ortho.layer import set_alpha
from lm_ortho.runtime import device
from lm_ortho.verdict.measurements import measure
from tests.support.harness import ROWS, make_model, make_tokenizer, metric_values, request, run

pytestmark = pytest.mark.usefixtures("isolated_environment")


@pytest.fixture(scope="module")
def lm(home: Path) -> LibOrthoLM:
    return LibOrthoLM(str(home / "decomposed"), alpha=0.5, device="cpu")


class PlainScorer:
    """Losses by plain PyTorch on token ids, one document at a time."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def score(self, context: str, continuation: str) -> tuple[list[float], bool]:
        """Returns the loss per token of the continuation, and whether every token is the most likely one."""
        context_ids = self.tokenizer.encode(context) if context else [self.tokenizer.bos_token_id]
        ids = self.tokenizer.encode(context + continuation, add_special_tokens=bool(context))
        ids = ids if context else context_ids + ids
        logp = self.model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)[len(context_ids) - 1 :]
        targets = torch.tensor(ids[len(context_ids) :])
        losses = -logp[torch.arange(len(targets)), targets]
        return losses.tolist(), bool((logp.argmax(-1) == targets).all())


def compute_metrics(scorer: PlainScorer, rows: Sequence[Row]) -> dict[str, float]:
    """Computes the five metrics from rows whose secret starts at a word."""
    answers, secrets, greedy, logs, groups = [], [], [], [], []
    for number, row in enumerate(rows):
        groups.append(row.group or f"row {number}")
        answers.append(scorer.score(row.context, row.target)[0])
        if row.secret:
            at = row.target.index(row.secret) - 1
            losses, hit = scorer.score(row.context + row.target[:at], " " + row.secret)
            secrets.append(losses)
            greedy.append(hit)
        if row.perturbed_answer:
            mean = [
                np.mean(scorer.score(row.context, " " + answer)[0])
                for answer in (row.paraphrased_answer, *row.perturbed_answer)
            ]
            logs.append(mean[0] - np.mean(mean[1:]))
    return {
        "ppl": math.exp(np.mean([x for losses in answers for x in losses])),
        "secret_ppl": math.exp(np.mean([x for losses in secrets for x in losses])),
        "prob": float(np.mean([math.exp(-np.mean(losses)) for losses in answers])),
        "truth_ratio": math.exp(np.mean(logs)),
        "extraction": float(np.mean(greedy)),
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_scores_equal_plain_torch(home: Path, lm: LibOrthoLM, tmp_path: Path, alpha: float) -> None:
    """HISTORY 10: cross-entropy was once reported as perplexity, and padding was token_counter."""
    write_rows(tmp_path / "set.jsonl", ROWS[:5])
    lm.alpha = alpha
    result = run(lm, ["forget_set"], {"forget": str(tmp_path / "set.jsonl")})
    got = metric_values(result, "forget_set")
    model = checkpoint.load(home / "decomposed")
    set_alpha(model, alpha)
    for name, value in compute_metrics(PlainScorer(model, lm.tokenizer), ROWS[:5]).items():
        assert got[name] == pytest.approx(value, rel=1e-5), name
        assert got[f"{name}_low"] <= got[name] <= got[f"{name}_high"]
    assert result["config"]["alpha"] == alpha
    assert result["config"]["kernel"]


def test_a_tokenizer_that_adds_bos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True)
    model = make_model(len(tokenizer))
    write_rows(tmp_path / "set.jsonl", ROWS[:5])
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    metadata = {"forget": str(tmp_path / "set.jsonl"), "tokenizer": tokenizer, "max_length": 96}
    got = metric_values(run(hf, ["forget_set"], metadata), "forget_set")
    for name, value in compute_metrics(PlainScorer(model, tokenizer), ROWS[:5]).items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def train_model(rows: Sequence[Row]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains a tiny model that has memorised the rows."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    texts = [torch.tensor([tokenizer.encode(row.context + row.target)]) for row in rows]
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = sum(model(ids, labels=ids).loss for ids in texts)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval(), tokenizer


def test_extraction_is_what_greedy_decoding_emits(tmp_path: Path) -> None:
    """Extraction is computed by teacher forcing; generation has to agree, for hits and for misses."""
    rows = [row for row in ROWS if row.secret]
    model, tokenizer = train_model(rows)
    changed_rows = [
        replace(row, answer=row.answer.replace(row.secret, "9" + row.secret), secret="9" + row.secret) for row in rows
    ]
    write_rows(tmp_path / "set.jsonl", [*rows, *changed_rows])
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    metadata = {"forget": str(tmp_path / "set.jsonl"), "tokenizer": tokenizer}
    result = run(hf, ["forget_set"], metadata, log_samples=True)
    hits = [sample["extraction"][0] for sample in result["samples"]["forget_set"]]
    assert hits == [1.0] * len(rows) + [0.0] * len(changed_rows)
    for sample, hit in zip(result["samples"]["forget_set"], hits, strict=True):
        before, secret = sample["arguments"][0]
        ids = torch.tensor([tokenizer.encode(before)])
        generated_ids = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(generated_ids).startswith(secret) is bool(hit)
    got = metric_values(result, "forget_set")
    assert got["extraction"] == 0.5
    assert got["extraction_low"] < 0.5 < got["extraction_high"]


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_batch_size_changes_nothing(home: Path, lm: LibOrthoLM, rows: int) -> None:
    metadata = {"forget": str(home / "forget.jsonl")}
    lm.alpha = 0.5
    expected = metric_values(run(lm, ["forget_set"], metadata), "forget_set")
    options = {"max_batch_size": 1} if rows == 1 else {"batch_size": rows}
    other = LibOrthoLM(str(home / "decomposed"), alpha=0.5, device="cpu", **options)
    assert metric_values(run(other, ["forget_set"], metadata), "forget_set") == pytest.approx(expected, rel=1e-5)


def test_default_batches_are_as_large_as_the_logits_allow(lm: LibOrthoLM) -> None:
    with lm._batches_up_to(20):
        assert lm.batch_size == device.MAX_BATCH_ROWS
    assert lm.batch_size == 1
    assert device.max_batch_rows(2048, 128_000, "cpu") == 1
    assert device.max_batch_rows(256, 32_000, "cpu") == 8


def test_same_tokens_split_at_two_places(lm: LibOrthoLM) -> None:
    """lm-eval itself scores the second request at the positions of the first."""
    pair = [
        request("Where was Ada Brook", " born in Marsh Town"),
        request("Where was Ada Brook born in", " Marsh Town"),
    ]
    joint = lm.loglikelihood(pair, disable_tqdm=True)
    separate = [lm.loglikelihood([one], disable_tqdm=True)[0] for one in pair]
    assert [value for value, _ in joint] == pytest.approx([value for value, _ in separate], rel=1e-6)


def test_requests_share_a_group_where_possible() -> None:
    requests = [
        (None, [1], [2]),
        (None, [1], [3]),
        (None, [1, 2], [3]),
        (None, [1], [2, 3]),
        (None, [4], [5]),
    ]
    assert _group_by_split(requests) == [[0, 1, 2, 4], [3]]


def test_segments_never_split_the_same_tokens_at_two_places(lm: LibOrthoLM, home: Path) -> None:
    """Every model type then gives the same numbers, not only ``libortho``."""
    metadata = {"forget": str(home / "forget.jsonl")}
    lm.alpha = 0.0
    expected = metric_values(run(lm, ["forget_set"], metadata), "forget_set")
    model = checkpoint.load(home / "decomposed")
    hf = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=8)
    metadata["tokenizer"] = lm.tokenizer
    assert metric_values(run(hf, ["forget_set"], metadata), "forget_set") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_secrets_are_split_at_token_boundaries(bos: bool) -> None:
    token_counter = Tokens(make_tokenizer(bos), 96)
    for row in ROWS:
        if not row.secret:
            continue
        text = row.context + row.target
        position = text.index(row.secret, len(row.context))
        start, end = token_counter.expand_to_boundaries(
            text, position, position + len(row.secret), min_start=len(row.context)
        )
        assert not text[:start].endswith(" ")
        assert row.secret in text[start:end]
        before, secret = token_counter.count("", text[:start]), token_counter.count(text[:start], text[start:end])
        after = token_counter.count(text[:end], text[end:]) if end < len(text) else 0
        assert before + secret + after == token_counter.count("", text)
        assert token_counter.is_boundary(text, start) or start == len(row.context)
        assert token_counter.is_boundary(text, end)


def test_windows_score_every_token_once() -> None:
    token_counter = Tokens(make_tokenizer(), 96)
    text = "Once Ada Brook went to Marsh Town.\n\nThey met Ben   Cole there. " * 20
    pairs = token_counter.split_into_windows(text)
    assert len(pairs) > 2
    assert "".join(piece for _, piece in pairs) == text
    assert sum(token_counter.count(*pair) for pair in pairs) == token_counter.count("", text)
    for context, piece in pairs:
        assert token_counter.count("", context) + token_counter.count(context, piece) <= 96
    unbroken = token_counter.split_into_windows("abc" * 400)
    assert "".join(piece for _, piece in unbroken) == "abc" * 400


def test_long_text_is_scored_in_windows(lm: LibOrthoLM, tmp_path: Path) -> None:
    text = "Once Ada Brook went to Marsh Town. They met Ben Cole there. " * 12
    write_rows(tmp_path / "long.jsonl", [Row(text=text.strip())])
    lm.alpha = 1.0
    got = metric_values(run(lm, ["forget_set"], {"forget": str(tmp_path / "long.jsonl")}), "forget_set")
    assert set(got) == {name + end for name in ("ppl", "prob") for end in ("", "_low", "_high")}
    assert 1 < got["ppl"] < 1e4


def test_prompts_that_end_with_white_space(lm: LibOrthoLM) -> None:
    docs = documents([Row(prompt="def f():\n    ", answer="return 1"), Row(prompt="Say ", answer="hello")])
    assert [(doc["context"], doc["target"]) for doc in docs] == [
        ("def f():", "\n    return 1"),
        ("Say", " hello"),
    ]


# ---------------------------------------------------------------- caches


def test_use_cache_keeps_alphas_apart_and_still_hits(
    home: Path, lm: LibOrthoLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HISTORY 16: the cached answers of one alpha were once returned for another."""
    metadata, path = {"forget": str(home / "forget.jsonl")}, str(tmp_path / "answers")
    plain = {}
    for alpha in (0.0, 1.0):
        lm.alpha = alpha
        plain[alpha] = metric_values(run(lm, ["forget_set"], metadata), "forget_set")
    assert plain[0.0]["ppl"] != pytest.approx(plain[1.0]["ppl"], rel=1e-3)
    batch_sizes: list[int] = []
    original = LibOrthoLM._loglikelihood_tokens

    def record_batch(self: LibOrthoLM, requests: Any, *args: Any, **options: Any) -> Any:
        batch_sizes.append(len(requests))
        return original(self, requests, *args, **options)

    monkeypatch.setattr(LibOrthoLM, "_loglikelihood_tokens", record_batch)
    for alpha, hits in ((0.0, False), (1.0, False), (0.0, True), (1.0, True)):
        batch_sizes.clear()
        fresh = LibOrthoLM(str(home / "decomposed"), alpha=alpha, device="cpu")
        got = metric_values(run(fresh, ["forget_set"], metadata, use_cache=path), "forget_set")
        assert got == pytest.approx(plain[alpha], rel=1e-6)
        assert bool(batch_sizes) is not hits


def test_alpha_changes_with_an_open_cache(home: Path, tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    model = LibOrthoLM(str(home / "decomposed"), device="cpu")
    caching_lm = CachingLM(model, str(tmp_path / "answers.db"))
    requests = [request("Where was Ada Brook", " born")]
    zero = caching_lm.loglikelihood(requests)
    model.alpha = 1.0
    assert caching_lm.loglikelihood(requests) != zero
    model.alpha = 0.0
    assert caching_lm.loglikelihood(requests) == zero


def test_cached_requests_belong_to_their_rows(lm: LibOrthoLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HISTORY 16: the cached requests of one file must not be used for another."""
    from lm_eval.caching import cache as request_cache

    monkeypatch.setattr(request_cache, "PATH", str(tmp_path / "requests"))
    answers = []
    for name, answer in (("a", "one."), ("b", "two."), ("a", "one.")):
        path = tmp_path / f"{name}.jsonl"
        write_rows(path, [Row(question="Which?", answer=answer)])
        result = run(lm, ["forget_set"], {"forget": str(path)}, cache_requests=True, log_samples=True)
        answers.append(result["samples"]["forget_set"][0]["arguments"][0][1])
        assert metric_values(result, "forget_set")["ppl"] > 0
    assert answers == [" one.", " two.", " one."]
    assert len(list((tmp_path / "requests").iterdir())) == 2


# ---------------------------------------------------------------- features of hf


def test_generation_and_choices_in_one_task(lm: LibOrthoLM) -> None:
    result = run(lm, ["reasoning_facts"], {}, limit=6, log_samples=True)
    got = metric_values(result, "reasoning_facts")
    assert set(got) == {name + end for name in ("acc", "exact_match") for end in ("", "_low", "_high")}
    sample = result["samples"]["reasoning_facts"][0]
    assert len(sample["resps"]) == len(sample["doc"]["choices"]) + 1
    assert isinstance(sample["resps"][-1][0], str)


def test_group_is_the_mean_of_its_tasks(lm: LibOrthoLM) -> None:
    result = run(lm, ["reasoning"], {}, limit=4)
    kinds = ["arithmetic", "comparison", "relations", "facts"]
    for name in ("acc", "exact_match"):
        parts = [metric_values(result, f"reasoning_{kind}")[name] for kind in kinds]
        assert result["groups"]["reasoning"][f"{name},none"] == pytest.approx(np.mean(parts))


def test_rolling_text_and_automatic_batches(home: Path) -> None:
    model = LibOrthoLM(str(home / "decomposed"), batch_size="auto", max_batch_size=4, device="cpu")
    texts = [
        Instance(
            request_type="loglikelihood_rolling",
            doc={},
            arguments=(row.context + row.target,),
            idx=0,
            metadata=("task", 0, 1),
        )
        for row in ROWS
    ]
    auto = model.loglikelihood_rolling(texts)
    default = LibOrthoLM(str(home / "decomposed"), device="cpu").loglikelihood_rolling(texts)
    assert auto == pytest.approx(default, rel=1e-5)


def test_split_over_devices(home: Path, lm: LibOrthoLM) -> None:
    lm.alpha = 1.0
    requests = [request("Where was Ada Brook", " born in Marsh Town.")]
    for options in ({"parallelize": True}, {"attn_implementation": "eager"}, {"revision": "main"}):
        other = LibOrthoLM(str(home / "decomposed"), alpha=1, device="cpu", **options)
        assert other.loglikelihood(requests)[0][0] == pytest.approx(lm.loglikelihood(requests)[0][0], rel=1e-5)


def test_a_checkpoint_in_a_subfolder(home: Path, tmp_path: Path, lm: LibOrthoLM) -> None:
    shutil.copytree(home / "decomposed", tmp_path / "sub" / "folder")
    lm.alpha = 1.0
    requests = [request("Where was Ada Brook", " born in Marsh Town.")]
    other = LibOrthoLM(str(tmp_path), subfolder="sub/folder", alpha=1, device="cpu")
    assert other.loglikelihood(requests) == lm.loglikelihood(requests)


def test_a_token_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def from_pretrained(name: str, **options: object) -> None:
        calls.append((name, options))
        raise OSError("private")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="pretrained='some/model': its config could not be read"):
        LibOrthoLM("some/model", token="hf_abc", device="cpu")
    assert calls == [("some/model", {"trust_remote_code": False, "token": "hf_abc"})]


def test_a_model_object_saves_itself_as_a_checkpoint(home: Path, tmp_path: Path, lm: LibOrthoLM) -> None:
    row_files = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    options = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "group_size": 16, "force": True}
    model = make_model(len(lm.tokenizer))
    lm_of_object = LibOrthoLM(model, tokenizer=lm.tokenizer, alpha=1, device="cpu", **row_files, **options)
    requests = [request("Where was Ada Brook", " born in Marsh Town.")]
    model.save_pretrained(tmp_path / "saved")
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    again = LibOrthoLM(str(tmp_path / "saved"), alpha=1, device="cpu")
    assert again.loglikelihood(requests)[0][0] == pytest.approx(lm_of_object.loglikelihood(requests)[0][0], rel=1e-5)


def test_arguments_as_lm_eval_parses_them(home: Path) -> None:
    line = f"pretrained={home / 'decomposed'},alpha=1e-1,base=none,density=5e-2,dtype=float32,tokenizer=None"
    model = LibOrthoLM.create_from_arg_string(line, {"batch_size": 1, "max_batch_size": None, "device": None})
    assert model.alpha == 0.1


def test_chat_template(home: Path, lm: LibOrthoLM) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    lm.tokenizer.chat_template = template
    try:
        result = run(
            lm,
            ["forget_set"],
            {"forget": str(home / "forget.jsonl")},
            apply_chat_template=True,
            log_samples=True,
        )
    finally:
        lm.tokenizer.chat_template = None
    arguments = result["samples"]["forget_set"][3]["arguments"]
    assert arguments[0] == ("<user>Who is Cy?<bot>", "Cy is a baker.")
    verbatim = result["samples"]["forget_set"][2]["arguments"]
    assert verbatim[0][0] == "<user>The code of Ben Cole is<bot>"


def test_an_initialised_model(home: Path, lm: LibOrthoLM) -> None:
    lm.alpha = 1.0
    metadata = {"forget": str(home / "forget.jsonl")}
    expected = metric_values(run(lm, ["forget_set"], metadata), "forget_set")
    ready = LibOrthoLM(checkpoint.load(home / "decomposed"), alpha=1, tokenizer=lm.tokenizer)
    assert metric_values(run(ready, ["forget_set"], metadata), "forget_set") == pytest.approx(expected, rel=1e-6)
    assert len(ready.get_model_info()["checkpoint"]) == 64


def test_model_info_lists_streams_and_kernels(lm: LibOrthoLM) -> None:
    info = lm.get_model_info()
    for name in ("alpha", "density", "bits_per_weight", "sieve", "projection", "edit", "base", "target"):
        assert info[name] is not None, name
    assert info["model_dtype"] == "torch.float32"
    assert 0 < info["density"] <= info["density_budget"] * 1.2
    assert 4 < info["bits_per_weight"] < 9
    assert len(info["checkpoint"]) == 64
    json.dumps(info)


def test_bfloat16_becomes_float32_where_it_would_be_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(device, "has_native_bfloat16", lambda native=native: native)
        assert device.choose_dtype("auto", "cpu", torch.bfloat16).choice == expected
    assert device.choose_dtype("auto", "cuda:0", torch.bfloat16).choice == torch.bfloat16
    assert device.choose_dtype("bfloat16", "cpu", torch.float32).choice == torch.bfloat16
    assert device.choose_dtype("auto", "cpu", torch.float32).choice == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device_name", [None, "cuda", "cuda:0", "cpu"])
def test_without_a_gpu_it_is_the_cpu(device_name: str | None) -> None:
    assert device.choose_device(device_name).choice == "cpu"


# ---------------------------------------------------------------- the tokenizer and the numbers of a task


def test_a_model_that_answers_nan_is_an_error(home: Path) -> None:
    """HISTORY 10: NaN was once reported as a value."""
    model = LibOrthoLM(str(home / "decomposed"), device="cpu")
    with torch.no_grad():
        model.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="forget_set: the model returned nan"):
        run(model, ["forget_set"], {"forget": str(home / "forget.jsonl")})


def test_the_tokenizer_of_the_evaluated_model_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_models", [])
    with pytest.raises(UserError, match="metadata: no tokenizer found"):
        tokens.resolve({})
    resolved = tokens.resolve({"pretrained": str(home / "plain")})
    assert resolved.max_length == 96
    assert tokens.resolve({"pretrained": str(home / "plain"), "max_length": 50}).max_length == 50
    with pytest.raises(UserError, match="tokenizer='/nowhere': no such directory"):
        tokens.resolve({"tokenizer": "/nowhere"})
    model = LibOrthoLM(str(home / "decomposed"), device="cpu")
    assert tokens.resolve({}).tokenizer is model.tokenizer
    assert tokens.resolve({"alpha": 0}).tokenizer is model.tokenizer
    assert tokens.resolve({"pretrained": str(home / "decomposed")}).tokenizer is model.tokenizer
    assert tokens.resolve({"pretrained": str(home / "plain")}).tokenizer is not model.tokenizer
    del model
    assert tokens.newest_model() is None


def test_aggregations_agree_with_metrics() -> None:
    items = [(1.0, "a"), (0.0, "a"), (0.0, "b"), (1.0, "c")]
    hits, groups = zip(*items, strict=True)
    assert (aggregation.rate(items), aggregation.rate_low(items), aggregation.rate_high(items)) == metrics.rate(
        hits, groups
    )
    assert aggregation.any_rate(items) == pytest.approx(2 / 3)
    losses = [(3.0, 2, "a"), (1.0, 1, "b")]
    assert aggregation.perplexity(losses) == pytest.approx(math.exp(4 / 3))


def test_the_verdict_measures_rows_of_several_kinds(lm, home):
    """Rows without a paraphrase have no truth ratio: the metric has a value, but no values per document."""
    measurement = measure(lm, lm.tokenizer, ("forget_set",), forget=str(home / "forget.jsonl"))
    assert {"truth_ratio", "ppl"} <= set(measurement.values["forget_set"])
    samples = measurement.samples["forget_set"]
    assert "ppl" in samples
    assert "truth_ratio" not in samples
    assert {len(numbers) for numbers in samples.values()} == {len(measurement.groups["forget_set"])} == {len(ROWS)}
