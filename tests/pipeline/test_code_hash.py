"""The files whose code makes a result stale are collected by following imports."""

from __future__ import annotations

import pytest

from lm_ortho.pipeline.code_hash import DECOMPOSITION, EVALUATION, code_files


def test_files_of_a_root_and_of_its_imports() -> None:
    files = code_files("lm_ortho.streams")
    assert {"lm_ortho/__init__.py", "lm_ortho/streams/ortho_stream.py"} - files.keys() == set()
    assert {"kernels/reference.py", "kernels/cpu/avx512.cpp"} <= files.keys()
    assert not [name for name in files if name.startswith("lm_ortho/sieve")]


def test_an_import_inside_a_function_counts() -> None:
    assert "lm_ortho/world/corpus.py" in code_files("lm_ortho.pipeline.spec")


def test_an_import_for_type_checkers_does_not() -> None:
    assert not [name for name in code_files("lm_ortho.errors") if name.startswith("lm_ortho/layer")]


def test_all_packages_of_a_decomposition_are_included() -> None:
    rooms = "calibration data edit finetune layer objective projection sieve streams".split()
    files = code_files(*DECOMPOSITION)
    assert all(any(name.startswith(f"lm_ortho/{room}/") for name in files) for room in rooms)
    assert not [name for name in files if name.startswith(("lm_ortho/cli/", "lm_ortho/harness/", "lm_ortho/verdict/"))]


def test_an_evaluation_depends_on_the_tasks_and_not_on_the_pipeline() -> None:
    files = code_files(*EVALUATION, without=("lm_ortho.pipeline",))
    assert {"tasks/_templates/forget", "lm_ortho/harness/tasks/secret.py", "lm_ortho/metrics/tofu.py"} <= files.keys()
    assert not [name for name in files if name.startswith(("lm_ortho/pipeline/", "lm_ortho/sieve/"))]


@pytest.mark.parametrize("roots", [{"args": ("lm_ortho.no_room",)}, {"args": ("tasks",), "without": ("lm_ortho.no",)}])
def test_an_unknown_root_is_an_error(roots) -> None:
    with pytest.raises(ValueError, match="names no module"):
        code_files(*roots.pop("args"), **roots)
