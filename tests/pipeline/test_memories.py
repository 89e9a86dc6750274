"""Several memories in one checkpoint: files, decomposition, arguments and lm-eval."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from lm_ortho import checkpoint
from lm_ortho.config import make_recipe
from lm_ortho.data.encoding import encode, token_losses
from lm_ortho.data.rows import Row, read_forget_sets, write_rows
from lm_ortho.dial import format_alpha, parse_alpha, parse_named_values
from lm_ortho.errors import UserError
from lm_ortho.layer import OrthoLinear, alpha_scope, find_linear, get_streams, patch, set_alpha
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.memories import add_memory, decompose_memories
from lm_ortho.streams import DEFAULT_MEMORY, LayerStreams, density
from tests.support import tiny
from tests.support.checkpoint import assert_same_model, tokenizer
from tests.support.lattices import project_around
from tests.support.memories import two_memories

pytestmark = pytest.mark.usefixtures("short_surrogate_training")

torch.set_num_threads(1)


def ignore_progress(*_):
    """A progress callback that does nothing."""


# --- checkpoints


@pytest.fixture
def saved_memories(tmp_path):
    model, _ = two_memories()
    return model, checkpoint.save(tmp_path / "checkpoint", model, tokenizer(), {"recipe": {"density": 0.05}})


def test_a_checkpoint_has_one_file_for_each_memory(saved_memories):
    model, path = saved_memories
    assert {file.name for file in path.glob("ortho*")} == {"ortho-a.safetensors", "ortho-b.safetensors"}
    assert checkpoint.list_memories(path) == ["a", "b"]
    for name in ("config.json", "manifest.json"):
        content = json.loads((path / name).read_text())
        assert content.get("quantization_config", content)["format_version"] == 2
    loaded_model = checkpoint.load(path)
    assert_same_model(loaded_model, model, (0.0, 1.0, {"a": 1}, {"b": 0.5, "a": 0.25}))
    again = checkpoint.save(path.parent / "again", loaded_model, None, checkpoint.read_meta(path))
    for file in path.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_a_memory_whose_file_is_gone_stays_off(saved_memories):
    model, path = saved_memories
    (path / "ortho-a.safetensors").unlink()
    loaded_model = checkpoint.load(path)
    assert_same_model(loaded_model, model, (0.0, {"b": 1}, {"a": 0, "b": 0.5}))
    for alpha in ({"a": 1}, 1.0, 0.5):
        with pytest.raises(UserError, match="of a: the file of this memory is missing"):
            set_alpha(loaded_model, alpha)
    with pytest.raises(UserError, match="a memory is added where all others are present"):
        add_memory(
            loaded_model,
            tokenizer(),
            "c",
            forget=[Row(text="x")],
            retain=[Row(text="y")],
            recipe=make_recipe(),
            progress=ignore_progress,
        )


def test_a_missing_first_memory_of_two_is_an_error_at_other_alphas(tmp_path):
    model, whole = two_memories()
    renamed_streams = {
        n: LayerStreams(s.base, s.named_memories["a"], s.bias, {"later": s.named_memories["b"]})
        for n, s in get_streams(model).items()
    }
    again = tiny.llama()
    patch(again, renamed_streams)
    path = checkpoint.save(tmp_path / "checkpoint", again, tokenizer(), {})
    (path / "ortho.safetensors").unlink()
    loaded_model = checkpoint.load(path)
    for alpha in (1.0, {"memory": 0.5}):
        with pytest.raises(UserError, match="of memory: the file of this memory is missing"):
            set_alpha(loaded_model, alpha)
    assert_same_model(loaded_model, again, (0.0, {"later": 1}))
    with pytest.raises(UserError, match="the ortho stream of memory is missing"):
        add_memory(
            loaded_model,
            tokenizer(),
            "c",
            forget=[Row(text="x")],
            retain=[Row(text="y")],
            recipe=make_recipe(),
            progress=ignore_progress,
        )
    assert whole


def test_a_changed_memory_file_is_refused(saved_memories):
    _, path = saved_memories
    shutil.copy(path / "ortho-a.safetensors", path / "ortho-b.safetensors")
    with pytest.raises(UserError, match=r"ortho-b.safetensors"):
        checkpoint.load(path)


def test_one_memory_keeps_the_first_format(tmp_path):
    path = checkpoint.save(tmp_path / "one", tiny.patched_model(), None, {})
    assert json.loads((path / "manifest.json").read_text())["format_version"] == 1
    assert checkpoint.list_memories(path) == [DEFAULT_MEMORY]
    assert "memories" not in json.loads((path / "config.json").read_text())["quantization_config"]


# --- decomposition


RECIPE = {"steps": 20, "density": 0.05, "group_size": 32}


def sets(memorised_models):
    half = len(memorised_models.forget) // 2
    return {"a": memorised_models.forget[:half], "b": memorised_models.forget[half:]}


@pytest.fixture(scope="module")
def two_memory_decomposition(memorised_models):
    model = copy.deepcopy(memorised_models.merged)
    decomposition = decompose_memories(
        model,
        memorised_models.tokenizer,
        sets(memorised_models),
        memorised_models.retain,
        make_recipe(**RECIPE),
        progress=ignore_progress,
    )
    return model, decomposition


def test_every_memory_restores_the_weights_of_its_own_support(memorised_models, two_memory_decomposition):
    weights = {name: layer.weight.detach() for name, layer in find_linear(memorised_models.merged).items()}
    model, decomposition = two_memory_decomposition
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in find_linear(model).items())
    total = sum(w.numel() for w in weights.values())
    for memory in ("a", "b"):
        assert sum(s.named_memories[memory].nnz for s in decomposition.streams.values()) == int(0.05 * total)
    supports = {
        name: streams.named_memories["a"].support() | streams.named_memories["b"].support()
        for name, streams in decomposition.streams.items()
    }
    rows = sets(memorised_models)
    lattice = project_around(
        model,
        memorised_models.tokenizer,
        (rows["a"], [*memorised_models.retain, *rows["b"]]),
        recipe=make_recipe(**RECIPE),
        support=supports,
    )
    for name, streams in decomposition.streams.items():
        on = supports[name]
        base = streams.base.dequantise()
        error = (streams.to_dense(1.0) - weights[name]).abs()
        assert (error[on] <= 2**-8 * (weights[name] - base).abs()[on] + 1e-12).all()
        assert torch.equal(base[~on], lattice[name][~on])
    assert density(decomposition.streams) == pytest.approx(decomposition.report["density_reached"])
    assert set(decomposition.report["memories"]) == {"a", "b"}
    assert decomposition.report["support"] == 2 * int(0.05 * total)


def test_one_memory_off_and_the_other_on(memorised_models, two_memory_decomposition):
    model, decomposition = copy.deepcopy(two_memory_decomposition[0]), two_memory_decomposition[1]
    patch(model, decomposition.streams)
    rows = sets(memorised_models)

    def losses(alpha):
        with alpha_scope(alpha):
            examples = {name: encode(memorised_models.tokenizer, part) for name, part in rows.items()}
            return {name: float(torch.cat(token_losses(model, part)).mean()) for name, part in examples.items()}

    losses_at_one = losses(1.0)
    for off, on in (("a", "b"), ("b", "a")):
        losses_one_off = losses({off: 0, on: 1})
        assert losses_one_off[off] > losses_at_one[off] + 0.2
        assert losses_one_off[on] == pytest.approx(losses_at_one[on], abs=0.05)


def test_a_memory_added_later_does_not_change_the_first(memorised_models, tmp_path):
    rows = sets(memorised_models)
    model = copy.deepcopy(memorised_models.merged)
    first = decompose(
        model,
        memorised_models.tokenizer,
        rows["a"],
        [*memorised_models.retain, *rows["b"]],
        make_recipe(**RECIPE),
        progress=ignore_progress,
    )
    patch(model, first.streams)
    decomposition = add_memory(
        model,
        memorised_models.tokenizer,
        "later",
        forget=rows["b"],
        retain=[*memorised_models.retain, *rows["a"]],
        recipe=make_recipe(**{**RECIPE, "density": 0.02, "bits": 8}),
        progress=ignore_progress,
    )
    on = checkpoint.load(_save_patched(memorised_models, decomposition.streams, tmp_path))
    for name, before in get_streams(model).items():
        after = decomposition.streams[name]
        new = after.named_memories["later"].support()
        assert after.base.bits == 4, "the lattice is the model's own"
        assert torch.equal(after.base.scales, before.base.scales)
        assert torch.equal(after.base.codes()[~new], before.base.codes()[~new])
        assert not (new & before.ortho.support()).any()
        for part, tensor in before.ortho.tensors().items():
            assert torch.equal(after.ortho.tensors()[part], tensor)
        error = (after.to_dense(1.0) - before.to_dense(1.0)).abs()
        assert (error <= 2**-8 * (before.to_dense(1.0) - after.base.dequantise()).abs() + 1e-12).all()
    assert decomposition.report["density_reached"] <= 0.02
    assert checkpoint.list_memories(tmp_path / "checkpoint") == [DEFAULT_MEMORY, "later"]
    set_alpha(on, {"memory": 1, "later": 0})
    with pytest.raises(UserError, match="'later' exists already"):
        add_memory(
            on,
            memorised_models.tokenizer,
            "later",
            forget=rows["b"],
            retain=memorised_models.retain,
            recipe=make_recipe(),
            progress=ignore_progress,
        )


def _save_patched(memorised_models, streams, folder):
    model = copy.deepcopy(memorised_models.merged)
    patch(model, streams)
    return checkpoint.save(folder / "checkpoint", model, None, {})


def test_bad_sets_of_memories(memorised_models):
    def decompose_sets(forget, **recipe):
        decompose_memories(
            copy.deepcopy(memorised_models.merged),
            memorised_models.tokenizer,
            forget,
            memorised_models.retain,
            make_recipe(**{**RECIPE, **recipe}),
            progress=ignore_progress,
        )

    rows = sets(memorised_models)
    with pytest.raises(UserError, match="no memory is named"):
        decompose_sets({})
    with pytest.raises(UserError, match=r"^forget: row 1 of a is also row \d+ of b; remove it from one of them$"):
        decompose_sets({"a": rows["a"], "b": [*rows["b"], rows["a"][0]]})
    with pytest.raises(UserError, match="memory name 'hub'"):
        decompose_sets({"hub": rows["a"], "b": rows["b"]})
    with pytest.raises(UserError, match="bits=16"):
        decompose_sets(rows, bits=16, edit="none")
    with pytest.raises(UserError, match=r"density: the memories need 1\.2 of the weights"):
        decompose_sets({**rows, "c": [Row(text="one more")]}, density=0.4, sieve="random", edit="zero")
    with pytest.raises(UserError, match="is not decomposed"):
        add_memory(
            memorised_models.merged,
            memorised_models.tokenizer,
            "c",
            forget=rows["a"],
            retain=rows["b"],
            recipe=make_recipe(),
            progress=ignore_progress,
        )


# --- arguments


def test_named_parts():
    assert parse_named_values("a:x.jsonl+b:hub:n:c:s", "forget") == {"a": "x.jsonl", "b": "hub:n:c:s"}
    assert parse_named_values("hub:locuslab/TOFU:forget10:train", "forget") is None
    assert parse_named_values("some+file.jsonl", "forget") is None
    assert parse_named_values("a:c++x.jsonl+b:y+z", "forget") == {"a": "c++x.jsonl", "b": "y+z"}
    assert parse_named_values("1:x.jsonl+2:y.jsonl", "forget") is None
    assert parse_named_values("0.5", "alpha") is None
    with pytest.raises(UserError, match=r"^alpha='a:1\+a:0' names a memory twice"):
        parse_named_values("a:1+a:0", "alpha")


def test_alpha_by_memory():
    assert parse_alpha("a:0+b:1") == {"a": 0.0, "b": 1.0}
    assert parse_alpha({"a": 0.5}) == {"a": 0.5}
    assert format_alpha(parse_alpha("a:0.25+b:1")) == "a:0.25+b:1"
    assert format_alpha(0.5) == "0.5"
    with pytest.raises(
        UserError, match=r"^alpha='1:0\+2:1' is neither a number nor name:value\+name:value, where a name"
    ):
        parse_alpha("1:0+2:1")
    for bad in ("a:2", "a:x+b:1", "a:", {"a": "nan"}, "9" * 5000, 10**400):
        with pytest.raises(UserError, match="alpha"):
            parse_alpha(bad)


def test_sets_by_memory(tmp_path):
    for name in ("x", "y"):
        write_rows(tmp_path / f"{name}.jsonl", [Row(text=f"text of {name}")])
    forget_sets = read_forget_sets(f"a:{tmp_path}/x.jsonl+b:{tmp_path}/y.jsonl")
    assert {name: [row.text for row in rows] for name, rows in forget_sets.items()} == {
        "a": ["text of x"],
        "b": ["text of y"],
    }
    assert list(read_forget_sets(f"{tmp_path}/x.jsonl")) == [DEFAULT_MEMORY]
    with pytest.raises(UserError, match="'memory' is reserved"):
        read_forget_sets(f"memory:{tmp_path}/x.jsonl+b:{tmp_path}/y.jsonl")
    with pytest.raises(UserError, match=r"forget=b='.*z.jsonl': no such file"):
        read_forget_sets(f"a:{tmp_path}/x.jsonl+b:{tmp_path}/z.jsonl")


# --- lm-eval


@pytest.mark.usefixtures("isolated_environment")
def test_two_alphas_in_the_model_args(home, tmp_path):
    from lm_ortho.checkpoint import cache
    from lm_ortho.harness.model import LibOrthoLM
    from tests.support.harness import ROWS, run

    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    recipe = {"sieve": "magnitude", "projection": "rtn", "edit": "zero", "density": 0.1, "group_size": 16}
    model_args = {
        "pretrained": str(home / "plain"),
        "forget": f"a:{tmp_path}/a.jsonl+b:{tmp_path}/b.jsonl",
        "retain": str(home / "retain.jsonl"),
        "force": True,
        **recipe,
    }
    with pytest.raises(UserError, match="there is no memory 'c'; the model has a, b"):
        LibOrthoLM(**model_args, alpha="a:0+c:1")
    assert not cache.list_entries()
    lm = LibOrthoLM(**model_args, alpha="a:0+b:1")
    fingerprint_before = lm.fingerprint()
    with pytest.raises(UserError, match="no memory 'c'"):
        lm.alpha = "a:0+c:1"
    assert lm.fingerprint() == fingerprint_before, "a refused alpha changes nothing"
    assert lm.alpha == {"a": 0.0, "b": 1.0}
    assert lm.get_model_info()["alpha"] == {"a": 0.0, "b": 1.0}
    assert lm.get_model_info()["density"] == pytest.approx(0.2, abs=0.01)
    fingerprints = {lm.fingerprint()}
    for alpha in (0, 1, "a:1+b:0", "a:1"):
        lm.alpha = alpha
        fingerprints.add(lm.fingerprint())
    assert len(fingerprints) == 5, "answers at other alphas are cached separately"
    results = run(lm, ["forget_set"], {})
    assert results["n-samples"]["forget_set"]["original"] == len(ROWS), "rows of both memories"
    cached_path = cache.list_entries()[0].path
    assert checkpoint.list_memories(cached_path) == ["a", "b"]
    with pytest.raises(UserError, match="there is no memory 'memory'"):
        LibOrthoLM(str(cached_path), alpha="memory:1")


@pytest.mark.usefixtures("isolated_environment")
def test_an_unknown_memory_is_refused_before_a_model_object_is_touched(home):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lm_ortho.harness.model import LibOrthoLM

    model = AutoModelForCausalLM.from_pretrained(home / "plain")
    words = AutoTokenizer.from_pretrained(home / "plain")
    sets = {"forget": f"a:{home}/forget.jsonl", "retain": f"{home}/retain.jsonl"}
    with pytest.raises(UserError, match="there is no memory 'b'; the model has a"):
        LibOrthoLM(model, tokenizer=words, alpha="b:1", **sets)
    assert not [module for module in model.modules() if isinstance(module, OrthoLinear)]


def test_an_addition_that_is_too_large_is_refused_at_once(memorised_models):
    model = tiny.patched_model(copy.deepcopy(memorised_models.merged), density=0.6)
    with pytest.raises(UserError, match=r"the memories need 0\.5 of the weights, and 0\.4"):
        add_memory(
            model,
            memorised_models.tokenizer,
            "late",
            forget=memorised_models.forget,
            retain=memorised_models.retain,
            recipe=make_recipe(density=0.5),
            progress=ignore_progress,
        )
