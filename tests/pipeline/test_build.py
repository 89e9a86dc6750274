"""Arguments of LibOrthoLM: which model they decompose or load, and which of them are refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from lm_ortho import checkpoint, world
from lm_ortho.checkpoint import cache
from lm_ortho.config import ModelSpec, split_model_args
from lm_ortho.data.rows import Row, write_rows
from lm_ortho.errors import UserError
from lm_ortho.harness import tokens
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.pipeline import build, loading
from lm_ortho.pipeline.cache_key import decomposition_key
from lm_ortho.pipeline.spec import resolve
from lm_ortho.streams import DEFAULT_MEMORY
from tests.support.harness import ROWS, make_model, request, run

pytestmark = pytest.mark.usefixtures("isolated_environment")


# ---------------------------------------------------------------- decomposing a user's model


RECIPE = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "density": 0.02, "group_size": 16}


@pytest.fixture
def model_args(home: Path) -> dict[str, Any]:
    return {
        "pretrained": str(home / "plain"),
        "forget": str(home / "forget.jsonl"),
        "retain": str(home / "retain.jsonl"),
        "device": "cpu",
        "force": True,  # the model is random
        **RECIPE,
    }


def test_a_users_model_is_decomposed_once(model_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = LibOrthoLM(**model_args, alpha=1)
    assert first.get_model_info()["density"] == pytest.approx(0.02, abs=0.001)
    (entry,) = cache.list_entries()
    monkeypatch.setattr(build, "decompose", lambda *_, **__: pytest.fail("decomposed again"))
    second = LibOrthoLM(**model_args, alpha=0)
    assert second.get_model_info()["checkpoint"] == first.get_model_info()["checkpoint"]
    assert second.fingerprint() != first.fingerprint()
    assert [later.key for later in cache.list_entries()] == [entry.key]


def test_fresh_decomposes_again_to_the_same_bits(model_args: dict[str, Any]) -> None:
    before = LibOrthoLM(**model_args).get_model_info()["checkpoint"]
    assert LibOrthoLM(**model_args, fresh=True).get_model_info()["checkpoint"] == before


@pytest.mark.parametrize("change", [{"density": 0.01}, {"seed": 1}, {"base": None}, {"retain": "other"}])
def test_other_arguments_have_another_cache_key(
    model_args: dict[str, Any], change: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    keys = []
    write_rows(tmp_path / "other.jsonl", [Row(question="Where is Q?", answer="Q is far.")])
    if change.get("retain"):
        change = {"retain": str(tmp_path / "other.jsonl")}
    for spec_args in (model_args, {**model_args, **change}):
        spec, _ = split_model_args(spec_args)
        keys.append(decomposition_key(resolve(spec)))
    assert keys[0] != keys[1]


def test_an_initialised_model_is_decomposed_in_place(model_args: dict[str, Any], home: Path) -> None:
    loaded_model = AutoModelForCausalLM.from_pretrained(home / "plain", dtype=torch.float32)
    model = LibOrthoLM(**{**model_args, "pretrained": loaded_model}, alpha=1)
    expected_model = LibOrthoLM(**model_args, alpha=1)
    requests = [request("Where was Ada Brook", " born in Marsh Town.")]
    assert model.loglikelihood(requests)[0][0] == pytest.approx(expected_model.loglikelihood(requests)[0][0], rel=1e-5)


@pytest.fixture
def package_weights(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small replacement for the weights of the package."""
    weights = tmp_path / "weights"
    shutil.copytree(home / "plain", weights / "base")
    shutil.copytree(home / "decomposed", weights / "decomposed")
    save_adapter(home, weights / "memory")
    monkeypatch.setattr(world, "WEIGHTS", weights)
    return weights


def test_the_default_is_the_shipped_decomposition(package_weights: Path) -> None:
    source = resolve(ModelSpec())
    assert (source.kind, source.location) == ("checkpoint", str(package_weights / "decomposed"))
    model = LibOrthoLM(device="cpu")
    assert model.alpha == 0
    assert tokens.resolve({}).tokenizer is model.tokenizer


@pytest.mark.parametrize(
    "arguments", [{"fresh": True}, {"base": "none"}, {"recipe": {"density": 0.01}}, {"recipe": {"seed": 1}}], ids=str
)
def test_other_arguments_decompose_the_embedded_model(package_weights: Path, arguments: dict[str, Any]) -> None:
    source = resolve(ModelSpec(**arguments))
    assert (source.kind, source.location) == ("embedded", str(package_weights / "base"))
    merged, before = loading.load_models(source)
    assert (before is None) is (arguments.get("base") == "none")
    assert merged.config.vocab_size > 0
    forget, retain = source.calibration_sets
    assert forget[DEFAULT_MEMORY][0].secret
    assert retain


def test_naming_a_default_changes_nothing(package_weights: Path) -> None:
    assert resolve(ModelSpec(recipe={"density": 0.02, "sieve": "attribution"})).kind == "checkpoint"


def test_without_the_shipped_decomposition(package_weights: Path) -> None:
    shutil.rmtree(package_weights / "decomposed")
    assert resolve(ModelSpec()).kind == "embedded"


def test_an_adapter_alone_is_refused(package_weights: Path) -> None:
    with pytest.raises(UserError, match="peft: the embedded model brings its own"):
        resolve(ModelSpec(peft="x"))


def save_adapter(home: Path, target: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    adapted_model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(home / "plain", dtype=torch.float32),
        LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted_model.save_pretrained(target)
    return target


def test_a_merged_adapter_makes_the_base_known(home: Path, model_args: dict[str, Any], tmp_path: Path) -> None:
    peft = save_adapter(home, tmp_path / "adapter")
    arguments = {k: model_args[k] for k in ("pretrained", "forget", "retain")}
    for base, is_base_known in (("auto", True), ("none", False), (None, False), (str(home / "plain"), True)):
        source = resolve(ModelSpec(**arguments, peft=str(peft), base=base, recipe=RECIPE))
        merged, before = loading.load_models(source)
        assert (before is not None) is is_base_known
        plain = make_model(merged.config.vocab_size).state_dict()
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(merged.state_dict()[name], plain[name])
        assert torch.equal(merged.state_dict()[name], merged.state_dict()[name].bfloat16().float())
        if before is not None:
            assert torch.equal(before.state_dict()[name], plain[name])


def save_adapter_with_tokens(home: Path, target: Path, **config: Any) -> Path:
    """An adapter that was trained with two added tokens and a chat template, with its tokenizer beside it."""
    from peft import LoraConfig, get_peft_model

    words = AutoTokenizer.from_pretrained(home / "plain")
    words.add_special_tokens({"additional_special_tokens": ["<turn>", "<over>"]})
    words.chat_template = "{% for m in messages %}<turn>{{ m.content }}<over>{% endfor %}<turn>"
    model = AutoModelForCausalLM.from_pretrained(home / "plain", dtype=torch.float32)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    torch.manual_seed(5)
    options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    peft_model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(target)
    words.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [-2, -1]}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["whole embedding", "rows of the tokens", "LoRA on a tied embedding"],
)
@pytest.mark.filterwarnings("ignore")  # of peft, about tied weights
def test_an_adapter_with_added_tokens_brings_its_tokenizer(
    home: Path, model_args: dict[str, Any], tmp_path: Path, config: dict[str, Any]
) -> None:
    from peft import PeftModel

    count = len(AutoTokenizer.from_pretrained(home / "plain"))
    if "trainable_token_indices" in config:
        config = {"trainable_token_indices": {"embed_tokens": [count, count + 1]}}
    peft = save_adapter_with_tokens(home, tmp_path / "adapter", **config)
    resolved = resolve(split_model_args({**model_args, "peft": str(peft)})[0])
    merged, before = loading.load_models(resolved)
    assert before is not None
    assert {network.config.vocab_size for network in (merged, before)} == {count + 2}
    lm = LibOrthoLM(**model_args, peft=str(peft), alpha=1)
    assert len(lm.tokenizer) == count + 2
    assert lm.tokenizer.chat_template.startswith("{% for m in messages %}<turn>")
    live_base = AutoModelForCausalLM.from_pretrained(home / "plain", dtype=torch.float32)
    live_base.resize_token_embeddings(count + 2, mean_resizing=False)
    live_base.load_state_dict(before.state_dict())
    live = PeftModel.from_pretrained(live_base, peft).eval()
    ids = lm.tokenizer("<turn>Where was Ada Brook born?<over><turn> Marsh Town", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, plain, result = (model(ids).logits for model in (live, before, merged))
    assert float((result - expected).norm() / (expected - plain).norm()) < 0.05
    for get in ("get_input_embeddings", "get_output_embeddings"):  # also where they are no longer tied
        assert torch.equal(getattr(lm.model, get)().weight, getattr(merged, get)().weight)
    named = resolve(split_model_args({**model_args, "peft": str(peft), "tokenizer": str(home / "plain")})[0])
    assert named.tokenizer == str(home / "plain"), "a named tokenizer is used"


def test_an_adapter_without_effect_is_refused_before_a_decomposition(
    home: Path, model_args: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    file = save_adapter(home, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_A" in name) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"^peft='.*adapter': the adapter changes no weight of the model"):
        LibOrthoLM(**model_args, peft=str(tmp_path / "adapter"))
    assert not cache.list_entries()


def test_a_model_that_does_not_know_the_rows_is_refused(model_args: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^forget: nothing says that the model knows these rows"):
        LibOrthoLM(**{**model_args, "force": False})
    assert not cache.list_entries()
    LibOrthoLM(**model_args)
    LibOrthoLM(**{**model_args, "force": False})  # found in the cache


# ---------------------------------------------------------------- bad input


def make_encoder_decoder(path: Path) -> str:
    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=32)
    T5ForConditionalGeneration(config).save_pretrained(path)
    return str(path)


def make_packed_model(path: Path, home: Path) -> str:
    path.mkdir()
    config = json.loads((home / "plain" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def make_empty_directory(path: Path) -> str:
    path.mkdir()
    return str(path)


def write_broken_rows(path: Path) -> str:
    path.write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    return str(path)


def write_no_rows(path: Path) -> str:
    path.write_text("\n")
    return str(path)


Change = Callable[[Path, Path, dict[str, Any]], dict[str, Any]]
BAD: list[tuple[str, str, Change]] = [
    ("alpha above one", "alpha=2 must", lambda t, h, o: {**o, "alpha": 2}),
    ("alpha a word", "alpha='abc' must", lambda t, h, o: {**o, "alpha": "abc"}),
    ("alpha nan", "alpha=nan must", lambda t, h, o: {**o, "alpha": math.nan}),
    ("no density", "density=0", lambda t, h, o: {**o, "density": 0}),
    ("sieve", "known: .*magnitude.*Did you mean 'magnitude'", lambda t, h, o: {**o, "sieve": "magnitud"}),
    ("projection", "projection='x' is unknown", lambda t, h, o: {**o, "projection": "x"}),
    ("w0 without base", "edit='w0' needs the model before", lambda t, h, o: {**o, "edit": "w0"}),
    ("subfolder", "the subfolder 'x' holds no config", lambda t, h, o: {**o, "subfolder": "x"}),
    ("revision", "revision='v9': pretrained=.* is a directory", lambda t, h, o: {**o, "revision": "v9"}),
    ("bits", "bits=5", lambda t, h, o: {**o, "bits": 5}),
    (
        "no such file",
        "forget='.*nowhere.jsonl': no such file",
        lambda t, h, o: {**o, "forget": f"{t}/nowhere.jsonl"},
    ),
    (
        "broken line",
        "forget=.*line 2: not valid JSON",
        lambda t, h, o: {**o, "forget": write_broken_rows(t / "b.jsonl")},
    ),
    ("no rows", "forget=.*holds no rows", lambda t, h, o: {**o, "forget": write_no_rows(t / "n.jsonl")}),
    ("same sets", "nothing can be both forgotten and kept", lambda t, h, o: {**o, "retain": o["forget"]}),
    ("forget missing", "^forget: your own model needs", lambda t, h, o: {**o, "forget": None}),
    ("retain missing", "^retain: your own model needs", lambda t, h, o: {**o, "retain": None}),
    ("packed", "quantised already .gptq", lambda t, h, o: {**o, "pretrained": make_packed_model(t / "p", h)}),
    ("encoder-decoder", "encoder-decoder", lambda t, h, o: {**o, "pretrained": make_encoder_decoder(t / "s")}),
    ("no config", "holds no config.json", lambda t, h, o: {**o, "pretrained": make_empty_directory(t / "e")}),
    ("no directory", "pretrained='/nowhere/at/all'", lambda t, h, o: {**o, "pretrained": "/nowhere/at/all"}),
    ("no network", "pretrained='some/model'", lambda t, h, o: {**o, "pretrained": "some/model"}),
    (
        "adapter",
        "is an adapter; give it as peft",
        lambda t, h, o: {**o, "pretrained": str(save_adapter(h, t / "a"))},
    ),
    ("no base", "base='./nowhere': no such directory", lambda t, h, o: {**o, "base": "./nowhere"}),
    ("unknown", "densty: .*did you mean density", lambda t, h, o: {**o, "densty": 1}),
    ("tp_plan", "tp_plan: ", lambda t, h, o: {**o, "tp_plan": "auto"}),
    ("kernel", "kernel='fast' is unknown", lambda t, h, o: {**o, "kernel": "fast"}),
    ("dtype", "dtype='float3' is unknown", lambda t, h, o: {**o, "dtype": "float3"}),
    ("fresh", "fresh='maybe'", lambda t, h, o: {**o, "fresh": "maybe"}),
    ("gguf", "gguf_file='x.gguf': no such file in", lambda t, h, o: {**o, "gguf_file": "x.gguf"}),
    ("peft", "peft=.*: no adapter_config.json", lambda t, h, o: {**o, "peft": make_empty_directory(t / "peft")}),
]


@pytest.mark.parametrize(("name", "message", "change"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_is_one_line(
    name: str, message: str, change: Change, home: Path, model_args: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error_info:
        LibOrthoLM(**change(tmp_path, home, model_args))
    assert "\n" not in str(error_info.value)
    assert not cache.list_entries()


CONTRADICTIONS = {
    "density=0.01 contradicts the checkpoint, which has density=0.05": {"density": 0.01},
    "sieve='magnitude' contradicts": {"sieve": "magnitude"},
    "base='./x' contradicts": {"base": "./x"},
    "fresh=true": {"fresh": True},
    "peft: ": {"peft": "x"},
}


@pytest.mark.parametrize(("message", "arguments"), CONTRADICTIONS.items(), ids=str)
def test_arguments_that_contradict_a_checkpoint(home: Path, message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        LibOrthoLM(str(home / "decomposed"), device="cpu", **arguments)


def test_arguments_that_agree_with_a_checkpoint(home: Path) -> None:
    model = LibOrthoLM(str(home / "decomposed"), device="cpu", density=0.05, sieve="random", bits="4")
    assert model.get_model_info()["density_budget"] == 0.05


def test_base_only_checkpoints_load_at_alpha_zero(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "decomposed", tmp_path / "base")
    (tmp_path / "base" / checkpoint.ORTHO_FILE).unlink()
    LibOrthoLM(str(tmp_path / "base"), device="cpu")
    with pytest.raises(UserError, match="alpha=1"):
        LibOrthoLM(str(tmp_path / "base"), device="cpu", alpha=1)


def test_sets_of_the_model_when_lm_eval_passes_nothing(home: Path, model_args: dict[str, Any]) -> None:
    model = LibOrthoLM(**model_args)
    result = run(model, ["forget_set", "retain_set"], {})
    assert result["n-samples"]["forget_set"]["original"] == len(ROWS)
    assert result["n-samples"]["retain_set"]["original"] == 3
    no_sets = LibOrthoLM(str(home / "decomposed"), device="cpu")
    with pytest.raises(UserError, match="forget: the forget_set task needs rows"):
        run(no_sets, ["forget_set"], {})


def test_a_model_in_a_subfolder_is_another_one(home: Path, model_args: dict[str, Any], tmp_path: Path) -> None:
    arguments = {k: model_args[k] for k in ("forget", "retain")}
    keys_and_sums = []
    for seed, name in enumerate(("a", "b")):
        shutil.copytree(home / "plain", tmp_path / name)
        make_model(len(AutoTokenizer.from_pretrained(home / "plain")), seed).save_pretrained(tmp_path / name)
        source = resolve(ModelSpec(**arguments, pretrained=str(tmp_path), subfolder=name))
        assert loading.load_tokenizer(source).vocab_size
        model, _ = loading.load_models(source)
        keys_and_sums.append((decomposition_key(source), float(next(model.parameters()).detach().sum())))
    assert keys_and_sums[0][0] != keys_and_sums[1][0]
    assert keys_and_sums[0][1] != keys_and_sums[1][1]


def test_the_key_depends_on_tokenizer_chat_template_and_order_of_sets(home: Path, tmp_path: Path) -> None:
    words = AutoTokenizer.from_pretrained(home / "plain")
    shutil.copy(home / "forget.jsonl", tmp_path / "b.jsonl")
    arguments = {"pretrained": str(home / "plain"), "retain": str(home / "retain.jsonl")}

    def compute_key(forget: str, tokenizer: Any = None) -> str:
        source = resolve(ModelSpec(**arguments, forget=forget, tokenizer=tokenizer))
        return decomposition_key(source)

    one = str(home / "forget.jsonl")
    keys = [
        compute_key(one),
        compute_key(one, words),
        compute_key(f"a:{one}+b:{tmp_path}/b.jsonl"),
        compute_key(f"b:{tmp_path}/b.jsonl+a:{one}"),
    ]
    words.chat_template = "{{ messages[0].content }}"
    keys.append(compute_key(one, words))
    assert len(set(keys)) == 5
