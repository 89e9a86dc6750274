"""An interrupted decomposition resumes from its last state and ends with the same bits as an uninterrupted one."""

from __future__ import annotations

import copy
import logging
import os
import time

import pytest
import torch

from lm_ortho.config import make_recipe
from lm_ortho.errors import UserError
from lm_ortho.objective import surrogate_training
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.memories import decompose_memories
from lm_ortho.pipeline.model_lattice import group_by_block
from lm_ortho.runtime import resume as resume_module
from lm_ortho.runtime.progress import no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder, save_state

torch.set_num_threads(1)


class InterruptionError(Exception):
    """Stands for the interruption of a run."""


@pytest.fixture(autouse=True)
def save_every_step(monkeypatch):
    monkeypatch.setattr(resume_module, "SAVE_INTERVAL", 0.0)
    monkeypatch.setattr(surrogate_training, "BUDGET", 0.15)


def interrupt_at(stage, step):
    def progress(current_stage, current_step, *_):
        if (current_stage, current_step) == (stage, step):
            raise InterruptionError

    return progress


def record_steps():
    """A list of (stage, step), and the callback that fills it."""
    steps = []
    return steps, lambda stage, step, *_: steps.append((stage, step))


def run_decomposition(memorised_models, resume=NO_RESUME, progress=no_progress, with_base=False, **recipe):
    return decompose(
        copy.deepcopy(memorised_models.merged),
        memorised_models.tokenizer,
        memorised_models.forget,
        retain=memorised_models.retain,
        recipe=make_recipe(**{"steps": 40, "density": 0.05, "group_size": 32, **recipe}),
        base_model=memorised_models.base if with_base else None,
        progress=progress,
        resume=resume,
    )


def assert_same_streams(result, expected):
    for name, layer in result.streams.items():
        for part, tensor in layer.tensors().items():
            assert torch.equal(tensor, expected.streams[name].tensors()[part]), (name, part)


@pytest.fixture(scope="module")
def uninterrupted_result(memorised_models):
    return run_decomposition(memorised_models)


@pytest.mark.parametrize(
    ("stage", "step"), [("projection", 9), ("attribution", 1), ("attribution", 3), ("attribution", 4), ("edit", 17)]
)
def test_the_same_bits_after_an_interruption(memorised_models, uninterrupted_result, tmp_path, stage, step):
    resume = ResumeFolder(tmp_path / "run")
    with pytest.raises(InterruptionError):
        run_decomposition(memorised_models, resume, interrupt_at(stage, step))
    steps, progress = record_steps()
    result = run_decomposition(memorised_models, resume, progress)
    assert_same_streams(result, uninterrupted_result)
    repeated_steps = [number for name, number in steps if name == stage]
    if stage == "projection":
        assert min(repeated_steps) == 8, "blocks of seven layers: the first block is not repeated"
    elif step > 1:
        assert min(repeated_steps, default=step) == step, "the step that was interrupted before its state was saved"
    if stage == "edit":
        assert not [name for name, _ in steps if name in ("attribution", "projection")]
    resume.clear()
    assert not (tmp_path / "run").exists()


def test_interrupted_three_times_and_between_groups(memorised_models, tmp_path):
    settings = {"groups": 3, "states": "bfloat16"}
    expected = run_decomposition(memorised_models, **settings)
    resume = ResumeFolder(tmp_path / "run")
    for stage, step in (("attribution 2 of 3", 2), ("attribution 3 of 3", 3), ("edit", 5)):
        with pytest.raises(InterruptionError):
            run_decomposition(memorised_models, resume, interrupt_at(stage, step), **settings)
    assert_same_streams(run_decomposition(memorised_models, resume, **settings), expected)


def test_a_surrogate_is_not_trained_again(memorised_models, tmp_path):
    expected = run_decomposition(memorised_models, with_base=True)
    resume = ResumeFolder(tmp_path / "run")
    with pytest.raises(InterruptionError):
        run_decomposition(memorised_models, resume, interrupt_at("attribution", 2), with_base=True)
    steps, progress = record_steps()
    assert_same_streams(run_decomposition(memorised_models, resume, progress, with_base=True), expected)
    assert [step for stage, step in steps if stage == "surrogate"] == [1]  # the line that says where it is from


def test_several_memories(memorised_models, tmp_path):
    half = len(memorised_models.forget) // 2
    rows = {"a": memorised_models.forget[:half], "b": memorised_models.forget[half:]}

    def run(resume, progress=no_progress):
        return decompose_memories(
            copy.deepcopy(memorised_models.merged),
            memorised_models.tokenizer,
            rows,
            retain=memorised_models.retain,
            recipe=make_recipe(steps=20, density=0.05, group_size=32),
            progress=progress,
            resume=resume,
        )

    expected, resume, steps = run(NO_RESUME), ResumeFolder(tmp_path / "run"), []

    def interrupt_second_edit(stage, step, *_):
        steps.append((stage, step))
        if steps.count(("edit", 7)) == 2:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run(resume, interrupt_second_edit)
    result = run(resume)
    for name, layer in expected.streams.items():
        for memory, ortho in layer.named_memories.items():
            assert torch.equal(ortho.vals, result.streams[name].named_memories[memory].vals)
        assert torch.equal(layer.base.qweight, result.streams[name].base.qweight)


# --- the resume folder


def test_without_a_folder_nothing_is_saved():
    NO_RESUME.save("a", 1)
    assert NO_RESUME.load("a") is None
    assert not NO_RESUME.is_due()
    assert NO_RESUME.subfolder("part").folder is None
    NO_RESUME.delete("a")
    NO_RESUME.clear()


def test_a_saved_state_is_loaded(tmp_path, monkeypatch, caplog):
    resume = ResumeFolder(tmp_path / "run")
    state = {"step": 3, "tensors": {"a": torch.arange(3)}, "draw": (3, (1, 2), None)}
    resume.save("edit", state)
    loaded_state = ResumeFolder(tmp_path / "run").load("edit")
    assert loaded_state["step"] == 3
    assert torch.equal(loaded_state["tensors"]["a"], torch.arange(3))
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "run").glob("*.partial"))
    monkeypatch.setattr(resume_module, "SAVE_INTERVAL", 1e6)
    assert not resume.is_due()
    resume.delete("edit")
    assert resume.load("edit") is None
    (tmp_path / "run" / "edit.pt").write_bytes(b"cut off")
    with caplog.at_level(logging.WARNING):
        assert resume.load("edit") is None
    assert "edit.pt cannot be read" in caplog.text


def test_two_runs_of_one_key_do_not_disturb_each_other(tmp_path):
    first, second = ResumeFolder(tmp_path / "run"), ResumeFolder(tmp_path / "run")
    torch_save = torch.save

    def save_both(state, path):
        torch_save(state, path)
        if state["run"] == "first":
            second.save("edit", {"run": "second"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save_both)
        first.save("edit", {"run": "first"})
    assert first.load("edit") == {"run": "first"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["edit.pt"]


def test_a_failed_save_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    resume = ResumeFolder(tmp_path / "run")

    def fail_on_full_disk(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", fail_on_full_disk)
    resume.save("edit", {})
    assert "edit.pt could not be saved (no space left)" in caplog.text
    assert not list((tmp_path / "run").iterdir())


def test_only_the_owner_can_read_the_folders(tmp_path):
    ResumeFolder(tmp_path / "cache" / "unfinished").subfolder("a").save("edit", {})
    for folder in ("cache", "cache/unfinished", "cache/unfinished/a"):
        assert (tmp_path / folder).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_a_state_is_private_from_its_first_byte(tmp_path, monkeypatch, umask):
    modes = []
    torch_save = torch.save

    def save_and_look(state, path):
        modes.append(path.stat().st_mode & 0o777)
        torch_save(state, path)
        modes.append(path.stat().st_mode & 0o777)

    monkeypatch.setattr(torch, "save", save_and_look)
    before = os.umask(umask)
    try:
        save_state({"steps": 1}, tmp_path / ".out.training-0123.pt")  # beside the model that implant writes
        save_state({"steps": 2}, tmp_path / ".out.training-0123.pt")
    finally:
        os.umask(before)
    assert modes == [0o600] * 4
    assert (tmp_path / ".out.training-0123.pt").stat().st_mode & 0o777 == 0o600


def test_what_killed_processes_left_is_deleted_after_a_day(tmp_path):
    names = (".state.pt.tmp-0123456789ab", ".state.pt.tmp-ba9876543210", ".other.pt.tmp-0123456789ab")
    for name, hours in zip(names, (25, 23, 25), strict=True):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    save_state({}, tmp_path / "state.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", *names[1:]}


def test_the_target_is_still_reported_after_an_interruption(memorised_models, tmp_path):
    resume = ResumeFolder(tmp_path / "run")
    first = run_decomposition(memorised_models, resume, edit="zero")
    second = run_decomposition(memorised_models, resume, edit="zero")
    assert first.report["target"] is not None
    assert second.report["target"] == first.report["target"]


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*set LM_ORTHO_CACHE"):
        ResumeFolder(tmp_path / "file" / "run").save("a", 1)


def test_names_are_grouped_by_block():
    names = ["model.layers.0.q", "model.layers.0.mlp.experts.up.3", "model.layers.1.q", "head.project"]
    assert group_by_block(names) == {
        "model.layers.0": ["model.layers.0.q", "model.layers.0.mlp.experts.up.3"],
        "model.layers.1": ["model.layers.1.q"],
        "rest": ["head.project"],
    }


@pytest.mark.usefixtures("isolated_environment")
def test_the_cache_resumes_an_interrupted_decomposition(home):
    from lm_ortho.checkpoint import cache
    from lm_ortho.config import ModelSpec
    from lm_ortho.pipeline import build
    from lm_ortho.pipeline.spec import resolve

    spec = ModelSpec(
        pretrained=str(home / "plain"),
        forget=str(home / "forget.jsonl"),
        retain=str(home / "retain.jsonl"),
        force=True,
        recipe={"steps": 20, "density": 0.05, "group_size": 16},
    )
    model = resolve(spec)
    with pytest.raises(InterruptionError):
        build.ensure_cached(model, interrupt_at("edit", 9))
    (unfinished,) = cache.cache_dir().glob("unfinished-*")
    assert {path.name for path in unfinished.iterdir()} >= {"support.pt", "edit.pt"}
    assert not cache.list_entries()
    steps, progress = record_steps()
    checkpoint = build.ensure_cached(model, progress)
    assert min(number for stage, number in steps if stage == "edit") == 9
    assert not unfinished.exists()
    assert [entry.path for entry in cache.list_entries()] == [checkpoint]
    unfinished.mkdir()
    surrogate = build.resume_folder(model, fresh=False).shared_folder("surrogate", "0" * 64)
    surrogate.save("adapter", {})
    assert surrogate.folder.parent == cache.cache_dir()
    fresh = resolve(spec.model_copy(update={"fresh": True}))
    assert (
        build.resume_folder(fresh, fresh=True).shared_folder("surrogate", "0" * 64).folder == unfinished / "surrogate"
    )
    cache.clear()
    assert not unfinished.exists()
    assert not surrogate.folder.exists()
