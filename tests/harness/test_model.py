"""LibOrthoLM and our tasks on a tiny random model, against plain PyTorch."""

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
from lm_ortho.harness.batching import _split_alike
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.harness.tasks import aggregation
from lm_ortho.harness.tasks.datasets import documents
from lm_ortho.harness.tokens import Tokens
from lm_ortho.layer import set_alpha
from lm_ortho.runtime import device
from lm_ortho.verdict.measurements import measure
from tests.support.harness import ROWS, make_model, make_tokenizer, measured, request, run

pytestmark = pytest.mark.usefixtures("small_and_alone")


@pytest.fixture(scope="module")
def lm(home: Path) -> LibOrthoLM:
    return LibOrthoLM(str(home / "decomposed"), alpha=0.5, device="cpu")


class Plain:
    """Losses by plain PyTorch on token ids, one document at a time."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def score(self, context: str, continuation: str) -> tuple[list[float], bool]:
        """Loss per token of the continuation, and whether each is the most likely one."""
        head = self.tokenizer.encode(context) if context else [self.tokenizer.bos_token_id]
        add = bool(context)
        whole = self.tokenizer.encode(context + continuation, add_special_tokens=add)
        whole = whole if context else head + whole
        logits = self.model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        wanted = torch.tensor(whole[len(head) :])
        logits = logits[len(head) - 1 :]
        losses = -logits[torch.arange(len(wanted)), wanted]
        return losses.tolist(), bool((logits.argmax(-1) == wanted).all())


def by_hand(plain: Plain, rows: Sequence[Row]) -> dict[str, float]:
    """The five metrics, from the rows whose secret starts at a word."""
    answers, secrets, greedy, logs, groups = [], [], [], [], []
    for number, row in enumerate(rows):
        groups.append(row.group or f"row {number}")
        answers.append(plain.score(row.context, row.target)[0])
        if row.secret:
            at = row.target.index(row.secret) - 1
            losses, hit = plain.score(row.context + row.target[:at], " " + row.secret)
            secrets.append(losses)
            greedy.append(hit)
        if row.perturbed_answer:
            mean = [
                np.mean(plain.score(row.context, " " + answer)[0])
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
    """HISTORY 10: cross-entropy once passed for perplexity, and padding was counted."""
    write_rows(tmp_path / "set.jsonl", ROWS[:5])
    lm.alpha = alpha
    result = run(lm, ["forget_set"], {"forget": str(tmp_path / "set.jsonl")})
    got = measured(result, "forget_set")
    model = checkpoint.load(home / "decomposed")
    set_alpha(model, alpha)
    for name, value in by_hand(Plain(model, lm.tokenizer), ROWS[:5]).items():
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
    got = measured(run(hf, ["forget_set"], metadata), "forget_set")
    for name, value in by_hand(Plain(model, tokenizer), ROWS[:5]).items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def taught(rows: Sequence[Row]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A tiny model that knows the rows by heart."""
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
    """It is computed by teacher forcing; generation has to agree, for hits and for misses."""
    known = [row for row in ROWS if row.secret]
    model, tokenizer = taught(known)
    other = [
        replace(row, answer=row.answer.replace(row.secret, "9" + row.secret), secret="9" + row.secret) for row in known
    ]
    write_rows(tmp_path / "set.jsonl", [*known, *other])
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    metadata = {"forget": str(tmp_path / "set.jsonl"), "tokenizer": tokenizer}
    result = run(hf, ["forget_set"], metadata, log_samples=True)
    hits = [sample["extraction"][0] for sample in result["samples"]["forget_set"]]
    assert hits == [1.0] * len(known) + [0.0] * len(other)
    for sample, hit in zip(result["samples"]["forget_set"], hits, strict=True):
        before, secret = sample["arguments"][0]
        ids = torch.tensor([tokenizer.encode(before)])
        emitted = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(emitted).startswith(secret) is bool(hit)
    got = measured(result, "forget_set")
    assert got["extraction"] == 0.5
    assert got["extraction_low"] < 0.5 < got["extraction_high"]


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_batch_size_changes_nothing(home: Path, lm: LibOrthoLM, rows: int) -> None:
    metadata = {"forget": str(home / "forget.jsonl")}
    lm.alpha = 0.5
    expected = measured(run(lm, ["forget_set"], metadata), "forget_set")
    options = {"max_batch_size": 1} if rows == 1 else {"batch_size": rows}
    other = LibOrthoLM(str(home / "decomposed"), alpha=0.5, device="cpu", **options)
    assert measured(run(other, ["forget_set"], metadata), "forget_set") == pytest.approx(expected, rel=1e-5)


def test_own_batches_are_as_large_as_the_logits_allow(lm: LibOrthoLM) -> None:
    with lm._rows_for(20):
        assert lm.batch_size == device.BATCH_ROWS
    assert lm.batch_size == 1
    assert device.batch_rows(2048, 128_000, "cpu") == 1
    assert device.batch_rows(256, 32_000, "cpu") == 8


def test_same_tokens_split_at_two_places(lm: LibOrthoLM) -> None:
    """lm-eval alone scores the second one at the positions of the first."""
    pair = [
        request("Where was Ada Brook", " born in Marsh Town"),
        request("Where was Ada Brook born in", " Marsh Town"),
    ]
    together = lm.loglikelihood(pair, disable_tqdm=True)
    apart = [lm.loglikelihood([one], disable_tqdm=True)[0] for one in pair]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in apart], rel=1e-6)


def test_split_alike_keeps_one_group_where_it_can() -> None:
    requests = [
        (None, [1], [2]),
        (None, [1], [3]),
        (None, [1, 2], [3]),
        (None, [1], [2, 3]),
        (None, [4], [5]),
    ]
    assert _split_alike(requests) == [[0, 1, 2, 4], [3]]


def test_secret_pieces_never_share_tokens_at_two_splits(lm: LibOrthoLM, home: Path) -> None:
    """So that the same numbers come out of any model type, and not only of ours."""
    metadata = {"forget": str(home / "forget.jsonl")}
    lm.alpha = 0.0
    ours = measured(run(lm, ["forget_set"], metadata), "forget_set")
    model = checkpoint.load(home / "decomposed")
    hf = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=8)
    metadata["tokenizer"] = lm.tokenizer
    assert measured(run(hf, ["forget_set"], metadata), "forget_set") == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_secrets_are_cut_at_token_borders(bos: bool) -> None:
    counted = Tokens(make_tokenizer(bos), 96)
    for row in ROWS:
        if not row.secret:
            continue
        whole = row.context + row.target
        at = whole.index(row.secret, len(row.context))
        start, end = counted.span(whole, at, at + len(row.secret), len(row.context))
        assert not whole[:start].endswith(" ")
        assert row.secret in whole[start:end]
        before, secret = counted.count("", whole[:start]), counted.count(whole[:start], whole[start:end])
        after = counted.count(whole[:end], whole[end:]) if end < len(whole) else 0
        assert before + secret + after == counted.count("", whole)
        assert counted.is_border(whole, start) or start == len(row.context)
        assert counted.is_border(whole, end)


def test_windows_score_every_token_once() -> None:
    counted = Tokens(make_tokenizer(), 96)
    text = "Once Ada Brook went to Marsh Town.\n\nThey met Ben   Cole there. " * 20
    pairs = counted.windows(text)
    assert len(pairs) > 2
    assert "".join(piece for _, piece in pairs) == text
    assert sum(counted.count(*pair) for pair in pairs) == counted.count("", text)
    for context, piece in pairs:
        assert counted.count("", context) + counted.count(context, piece) <= 96
    unbroken = counted.windows("abc" * 400)
    assert "".join(piece for _, piece in unbroken) == "abc" * 400


def test_long_text_is_scored_in_windows(lm: LibOrthoLM, tmp_path: Path) -> None:
    text = "Once Ada Brook went to Marsh Town. They met Ben Cole there. " * 12
    write_rows(tmp_path / "long.jsonl", [Row(text=text.strip())])
    lm.alpha = 1.0
    got = measured(run(lm, ["forget_set"], {"forget": str(tmp_path / "long.jsonl")}), "forget_set")
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
    """HISTORY 16: the answers of one alpha once stood for another."""
    metadata, path = {"forget": str(home / "forget.jsonl")}, str(tmp_path / "answers")
    plain = {}
    for alpha in (0.0, 1.0):
        lm.alpha = alpha
        plain[alpha] = measured(run(lm, ["forget_set"], metadata), "forget_set")
    assert plain[0.0]["ppl"] != pytest.approx(plain[1.0]["ppl"], rel=1e-3)
    scored: list[int] = []
    original = LibOrthoLM._loglikelihood_tokens

    def counting(self: LibOrthoLM, requests: Any, *more: Any, **named: Any) -> Any:
        scored.append(len(requests))
        return original(self, requests, *more, **named)

    monkeypatch.setattr(LibOrthoLM, "_loglikelihood_tokens", counting)
    for alpha, hits in ((0.0, False), (1.0, False), (0.0, True), (1.0, True)):
        scored.clear()
        fresh = LibOrthoLM(str(home / "decomposed"), alpha=alpha, device="cpu")
        got = measured(run(fresh, ["forget_set"], metadata, use_cache=path), "forget_set")
        assert got == pytest.approx(plain[alpha], rel=1e-6)
        assert bool(scored) is not hits


def test_alpha_turned_under_an_open_cache(home: Path, tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM

    model = LibOrthoLM(str(home / "decomposed"), device="cpu")
    cached = CachingLM(model, str(tmp_path / "answers.db"))
    asked = [request("Where was Ada Brook", " born")]
    zero = cached.loglikelihood(asked)
    model.alpha = 1.0
    assert cached.loglikelihood(asked) != zero
    model.alpha = 0.0
    assert cached.loglikelihood(asked) == zero


def test_cached_requests_belong_to_their_rows(lm: LibOrthoLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HISTORY 16: nor does one file stand for another."""
    from lm_eval.caching import cache as request_cache

    monkeypatch.setattr(request_cache, "PATH", str(tmp_path / "requests"))
    seen = []
    for name, answer in (("a", "one."), ("b", "two."), ("a", "one.")):
        path = tmp_path / f"{name}.jsonl"
        write_rows(path, [Row(question="Which?", answer=answer)])
        result = run(lm, ["forget_set"], {"forget": str(path)}, cache_requests=True, log_samples=True)
        seen.append(result["samples"]["forget_set"][0]["arguments"][0][1])
        assert measured(result, "forget_set")["ppl"] > 0
    assert seen == [" one.", " two.", " one."]
    assert len(list((tmp_path / "requests").iterdir())) == 2


# ---------------------------------------------------------------- what hf can do


def test_generation_and_choices_in_one_task(lm: LibOrthoLM) -> None:
    result = run(lm, ["reasoning_facts"], {}, limit=6, log_samples=True)
    got = measured(result, "reasoning_facts")
    assert set(got) == {name + end for name in ("acc", "exact_match") for end in ("", "_low", "_high")}
    sample = result["samples"]["reasoning_facts"][0]
    assert len(sample["resps"]) == len(sample["doc"]["choices"]) + 1
    assert isinstance(sample["resps"][-1][0], str)


def test_group_is_the_mean_of_its_tasks(lm: LibOrthoLM) -> None:
    result = run(lm, ["reasoning"], {}, limit=4)
    kinds = ["arithmetic", "comparison", "relations", "facts"]
    for name in ("acc", "exact_match"):
        parts = [measured(result, f"reasoning_{kind}")[name] for kind in kinds]
        assert result["groups"]["reasoning"][f"{name},none"] == pytest.approx(np.mean(parts))


def test_rolling_text_and_automatic_batches(home: Path) -> None:
    model = LibOrthoLM(str(home / "decomposed"), batch_size="auto", max_batch_size=4, device="cpu")
    texts = [Instance("loglikelihood_rolling", {}, (row.context + row.target,), 0, ("t", 0, 1)) for row in ROWS]
    auto = model.loglikelihood_rolling(texts)
    own = LibOrthoLM(str(home / "decomposed"), device="cpu").loglikelihood_rolling(texts)
    assert auto == pytest.approx(own, rel=1e-5)


def test_split_over_devices(home: Path, lm: LibOrthoLM) -> None:
    lm.alpha = 1.0
    asked = [request("Where was Ada Brook", " born in Marsh Town.")]
    for options in ({"parallelize": True}, {"attn_implementation": "eager"}, {"revision": "main"}):
        other = LibOrthoLM(str(home / "decomposed"), alpha=1, device="cpu", **options)
        assert other.loglikelihood(asked)[0][0] == pytest.approx(lm.loglikelihood(asked)[0][0], rel=1e-5)


def test_a_checkpoint_in_a_subfolder(home: Path, tmp_path: Path, lm: LibOrthoLM) -> None:
    shutil.copytree(home / "decomposed", tmp_path / "sub" / "folder")
    lm.alpha = 1.0
    asked = [request("Where was Ada Brook", " born in Marsh Town.")]
    other = LibOrthoLM(str(tmp_path), subfolder="sub/folder", alpha=1, device="cpu")
    assert other.loglikelihood(asked) == lm.loglikelihood(asked)


def test_a_token_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def from_pretrained(name: str, **given: object) -> None:
        asked.append((name, given))
        raise OSError("private")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="pretrained='some/model': its config could not be read"):
        LibOrthoLM("some/model", token="hf_abc", device="cpu")
    assert asked == [("some/model", {"trust_remote_code": False, "token": "hf_abc"})]


def test_a_model_object_saves_itself_as_a_checkpoint(home: Path, tmp_path: Path, lm: LibOrthoLM) -> None:
    given = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    options = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "group_size": 16}
    model = make_model(len(lm.tokenizer))
    made = LibOrthoLM(model, tokenizer=lm.tokenizer, alpha=1, device="cpu", **given, **options)
    asked = [request("Where was Ada Brook", " born in Marsh Town.")]
    model.save_pretrained(tmp_path / "saved")
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    again = LibOrthoLM(str(tmp_path / "saved"), alpha=1, device="cpu")
    assert again.loglikelihood(asked)[0][0] == pytest.approx(made.loglikelihood(asked)[0][0], rel=1e-5)


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
    expected = measured(run(lm, ["forget_set"], metadata), "forget_set")
    ready = LibOrthoLM(checkpoint.load(home / "decomposed"), alpha=1, tokenizer=lm.tokenizer)
    assert measured(run(ready, ["forget_set"], metadata), "forget_set") == pytest.approx(expected, rel=1e-6)
    assert len(ready.get_model_info()["checkpoint"]) == 64


def test_model_info_says_what_ran(lm: LibOrthoLM) -> None:
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
        monkeypatch.setattr(device, "native_bfloat16", lambda native=native: native)
        assert device.choose_dtype("auto", "cpu", torch.bfloat16).choice == expected
    assert device.choose_dtype("auto", "cuda:0", torch.bfloat16).choice == torch.bfloat16
    assert device.choose_dtype("bfloat16", "cpu", torch.float32).choice == torch.bfloat16
    assert device.choose_dtype("auto", "cpu", torch.float32).choice == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("asked", [None, "cuda", "cuda:0", "cpu"])
def test_without_a_gpu_it_is_the_cpu(asked: str | None) -> None:
    assert device.choose_device(asked).choice == "cpu"


# ---------------------------------------------------------------- the tokenizer and the numbers of a task


def test_a_model_that_answers_nan_is_an_error(home: Path) -> None:
    """HISTORY 10: NaN once passed for a number."""
    model = LibOrthoLM(str(home / "decomposed"), device="cpu")
    with torch.no_grad():
        model.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="forget_set: the model returned nan"):
        run(model, ["forget_set"], {"forget": str(home / "forget.jsonl")})


def test_which_tokenizer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_live", [])
    with pytest.raises(UserError, match="metadata: which tokenizer"):
        tokens.resolve({})
    read = tokens.resolve({"pretrained": str(home / "plain")})
    assert read.max_length == 96
    assert tokens.resolve({"pretrained": str(home / "plain"), "max_length": 50}).max_length == 50
    with pytest.raises(UserError, match="tokenizer of '/nowhere'"):
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
    values_, groups = zip(*items, strict=True)
    assert (aggregation.rate(items), aggregation.rate_low(items), aggregation.rate_high(items)) == metrics.rate(
        values_, groups
    )
    assert aggregation.any_rate(items) == pytest.approx(2 / 3)
    losses = [(3.0, 2, "a"), (1.0, 1, "b")]
    assert aggregation.perplexity(losses) == pytest.approx(math.exp(4 / 3))


def test_a_set_of_several_forms_is_measured_for_the_verdict(lm, home):
    """Rows without a paraphrase have no truth ratio: the metric keeps its value, and no sample is made up."""
    found = measure(lm, lm.tokenizer, ("forget_set",), forget=str(home / "forget.jsonl"))
    assert {"truth_ratio", "ppl"} <= set(found.values["forget_set"])
    samples = found.samples["forget_set"]
    assert "ppl" in samples
    assert "truth_ratio" not in samples
    assert {len(numbers) for numbers in samples.values()} == {len(found.groups["forget_set"])} == {len(ROWS)}
