"""An interrupted decomposition goes on where it was, and ends with the same bits as an undisturbed one."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import lm_ortho.objective.surrogate as surrogate_module
from lm_ortho.config import make_recipe
from lm_ortho.errors import UserError
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.memories import decompose_memories
from lm_ortho.pipeline.workbench import names_by_block
from lm_ortho.runtime import resume as keep_module
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

torch.set_num_threads(1)


class Stopped(Exception):  # noqa: N818
    """What an interruption looks like from inside."""


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(keep_module, "INTERVAL", 0.0)
    monkeypatch.setattr(surrogate_module, "STEPS", 6)
    monkeypatch.setattr(surrogate_module, "ROUNDS", 1)


def stops_at(stage, step):
    def progress(at, done, *_):
        if at == stage and done == step:
            raise Stopped

    return progress


def counted():
    steps = []
    return steps, lambda stage, done, *_: steps.append((stage, done))


def split(memorised, resume=NO_RESUME, progress=lambda *_: None, known=False, **recipe):
    return decompose(
        copy.deepcopy(memorised.merged), memorised.tokenizer, memorised.forget, memorised.retain,
        make_recipe(**{"steps": 40, "density": 0.05, "group_size": 32, **recipe}),
        base_model=memorised.base if known else None, progress=progress, resume=resume,
    )  # fmt: skip


def same(one, other):
    for name, layer in one.streams.items():
        for part, tensor in layer.tensors().items():
            assert torch.equal(tensor, other.streams[name].tensors()[part]), (name, part)


@pytest.fixture(scope="module")
def undisturbed(memorised):
    return split(memorised)


@pytest.mark.parametrize(
    ("stage", "step"), [("projection", 9), ("attribution", 1), ("attribution", 3), ("attribution", 4), ("edit", 17)]
)
def test_the_same_bits_after_an_interruption(memorised, undisturbed, tmp_path, stage, step):
    resume = ResumeFolder(tmp_path / "run")
    with pytest.raises(Stopped):
        split(memorised, resume, stops_at(stage, step))
    steps, progress = counted()
    again = split(memorised, resume, progress)
    same(again, undisturbed)
    done = [number for at, number in steps if at == stage]
    if stage == "projection":
        assert min(done) == 8, "blocks of seven layers: the first one is not done again"
    elif step > 1:
        assert min(done, default=step) == step, "the step that was interrupted before it was kept"
    if stage == "edit":
        assert not [at for at, _ in steps if at in ("attribution", "projection")]
    resume.clear()
    assert not (tmp_path / "run").exists()


def test_interrupted_twice_and_between_groups(memorised, tmp_path):
    undisturbed = split(memorised, groups=3, states="bfloat16")
    resume = ResumeFolder(tmp_path / "run")
    for stage, step in (("attribution 2 of 3", 2), ("attribution 3 of 3", 3), ("edit", 5)):
        with pytest.raises(Stopped):
            split(memorised, resume, stops_at(stage, step), groups=3, states="bfloat16")
    same(split(memorised, resume, groups=3, states="bfloat16"), undisturbed)


def test_a_surrogate_is_not_taught_again(memorised, tmp_path):
    undisturbed = split(memorised, known=True)
    resume = ResumeFolder(tmp_path / "run")
    with pytest.raises(Stopped):
        split(memorised, resume, stops_at("attribution", 2), known=True)
    steps, progress = counted()
    same(split(memorised, resume, progress, known=True), undisturbed)
    assert not [at for at, _ in steps if at.startswith("surrogate")]


def test_several_memories(memorised, tmp_path):
    half = len(memorised.forget) // 2
    rows = {"a": memorised.forget[:half], "b": memorised.forget[half:]}

    def made(resume, progress=lambda *_: None):
        return decompose_memories(
            copy.deepcopy(memorised.merged), memorised.tokenizer, rows, memorised.retain,
            make_recipe(steps=20, density=0.05, group_size=32), progress=progress, resume=resume,
        )  # fmt: skip

    undisturbed, resume, edits = made(NO_RESUME), ResumeFolder(tmp_path / "run"), []

    def in_the_second_edit(stage, done, *_):
        edits.append((stage, done))
        if edits.count(("edit", 7)) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        made(resume, in_the_second_edit)
    again = made(resume)
    for name, layer in undisturbed.streams.items():
        for memory, ortho in layer.named.items():
            assert torch.equal(ortho.vals, again.streams[name].named[memory].vals)
        assert torch.equal(layer.base.qweight, again.streams[name].base.qweight)


# --- the keeper


def test_a_keeper_without_a_folder_keeps_nothing():
    NO_RESUME.save("a", 1)
    assert NO_RESUME.load("a") is None
    assert not NO_RESUME.due()
    assert NO_RESUME.of("part").folder is None
    NO_RESUME.drop("a")
    NO_RESUME.clear()


def test_what_is_kept_comes_back(tmp_path, monkeypatch, caplog):
    resume = ResumeFolder(tmp_path / "run")
    state = {"step": 3, "tensors": {"a": torch.arange(3)}, "draw": (3, (1, 2), None)}
    resume.save("edit", state)
    found = ResumeFolder(tmp_path / "run").load("edit")
    assert found["step"] == 3
    assert torch.equal(found["tensors"]["a"], torch.arange(3))
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "run").glob("*.partial"))
    monkeypatch.setattr(keep_module, "INTERVAL", 1e6)
    assert not resume.due()
    resume.drop("edit")
    assert resume.load("edit") is None
    (tmp_path / "run" / "edit.pt").write_bytes(b"cut off")
    with caplog.at_level(logging.WARNING):
        assert resume.load("edit") is None
    assert "edit.pt cannot be read" in caplog.text


def test_two_runs_of_one_key_do_not_meet(tmp_path):
    one, other = ResumeFolder(tmp_path / "run"), ResumeFolder(tmp_path / "run")
    real = torch.save

    def meanwhile(state, path):
        real(state, path)
        if state["by"] == "one":
            other.save("edit", {"by": "other"})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "save", meanwhile)
        one.save("edit", {"by": "one"})
    assert one.load("edit") == {"by": "one"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["edit.pt"]


def test_what_cannot_be_kept_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    resume = ResumeFolder(tmp_path / "run")

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", full)
    resume.save("edit", {})
    assert "edit.pt could not be kept (no space left)" in caplog.text
    assert not list((tmp_path / "run").iterdir())


def test_the_folders_are_for_the_owner_only(tmp_path):
    ResumeFolder(tmp_path / "cache" / "unfinished").of("a").save("edit", {})
    for folder in ("cache", "cache/unfinished", "cache/unfinished/a"):
        assert (tmp_path / folder).stat().st_mode & 0o077 == 0


def test_the_target_is_still_told_after_an_interruption(memorised, tmp_path):
    resume = ResumeFolder(tmp_path / "run")
    fresh = split(memorised, resume, edit="zero")
    again = split(memorised, resume, edit="zero")
    assert fresh.report["target"] is not None
    assert again.report["target"] == fresh.report["target"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*set LM_ORTHO_CACHE"):
        ResumeFolder(tmp_path / "file" / "run").save("a", 1)


def test_blocks_of_names():
    names = ["model.layers.0.q", "model.layers.0.mlp.experts.up.3", "model.layers.1.q", "head.project"]
    assert names_by_block(names) == {
        "model.layers.0": ["model.layers.0.q", "model.layers.0.mlp.experts.up.3"],
        "model.layers.1": ["model.layers.1.q"],
        "rest": ["head.project"],
    }


@pytest.mark.usefixtures("small_and_alone")
def test_the_cache_goes_on_with_an_interrupted_decomposition(home):
    from lm_ortho.checkpoint import cache
    from lm_ortho.pipeline import build
    from lm_ortho.pipeline.spec import ModelSpec, resolve

    order = ModelSpec(
        pretrained=str(home / "plain"), forget=str(home / "forget.jsonl"), retain=str(home / "retain.jsonl"),
        recipe={"steps": 20, "density": 0.05, "group_size": 16},
    )  # fmt: skip
    source = resolve(order)
    with pytest.raises(Stopped):
        build.ensure_cached(source, stops_at("edit", 9))
    (left,) = cache.cache_dir().glob("unfinished-*")
    assert {path.name for path in left.iterdir()} >= {"support.pt", "edit.pt"}
    assert not cache.list_entries()
    steps, progress = counted()
    made = build.ensure_cached(source, progress)
    assert min(number for stage, number in steps if stage == "edit") == 9
    assert not left.exists()
    assert [entry.path for entry in cache.list_entries()] == [made]
    left.mkdir()
    cache.clear()
    assert not left.exists()
