"""The package as users get it: a wheel in a fresh environment, and an editable install.

The fresh environments see the libraries of the running one through a ``.pth`` file, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

LIBRARIES = Path(sysconfig.get_paths()["purelib"])
EXTRA_FOLDERS = ("tasks", "kernels")


RunFunction = Callable[..., subprocess.CompletedProcess[str]]


def _environment(**extra: str) -> dict[str, str]:
    """The environment of a user: without switches, paths of this repository or network."""
    dropped_names = {"PYTHONPATH", "LM_ORTHO_AUTOLOAD"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped_names}
    return environment | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | extra


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the source distribution, so that both are checked to be complete."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True, env=_environment(), timeout=180)
    (path,) = out.glob("*.whl")
    return path


def _fresh_python(folder: Path) -> Path:
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site_packages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (Path(site_packages) / "zz_libraries.pth").write_text(f"{LIBRARIES}\n")
    return python


def _pip_install(python: Path, *arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--force-reinstall",
    ]
    command += ["--no-deps", "--no-index", "--no-build-isolation", *arguments]
    subprocess.run(command, check=True, capture_output=True, env=_environment(), timeout=120)


@pytest.fixture(scope="session", params=["wheel", "editable"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the package installed as a wheel or editable."""
    interpreter = _fresh_python(tmp_path_factory.mktemp(request.param) / "env")
    if request.param == "wheel":
        _pip_install(interpreter, str(request.getfixturevalue("wheel")))
    else:
        _pip_install(interpreter, "--editable", str(REPOSITORY))
    return interpreter


@pytest.fixture
def run(python: Path, tmp_path: Path) -> RunFunction:
    """Runs the fresh interpreter in an empty folder."""

    def run_python(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *arguments],
            cwd=tmp_path,
            env=_environment(**environment),
            capture_output=True,
            text=True,
            check=check,
            timeout=300,
        )

    return run_python


def _lm_eval() -> str:
    """The console script that lm-eval installed, to be run by another interpreter."""
    return str(Path(sysconfig.get_paths()["scripts"]) / "lm_eval")


def _task_names() -> set[str]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads ``!function`` as text."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    configs = [yaml.load(file.read_text(), Loader) for file in (REPOSITORY / "tasks").rglob("*.yaml")]
    return {config.get("group") or config["task"] for config in configs}


def test_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {"lm_ortho.pth", "lm_ortho.start", "lm_ortho/py.typed"} <= names
    assert "libortho = lm_ortho.harness.model:LibOrthoLM" in entry_points
    assert "lm-ortho = lm_ortho.cli:main" in entry_points
    expected = {f"lm_ortho/{path}" for folder in EXTRA_FOLDERS for path in _files(REPOSITORY, folder)}
    expected |= _files(REPOSITORY, "lm_ortho")
    assert expected <= names
    assert not [name for name in names if "__pycache__" in name]
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"lm_ortho"}


def _files(root: Path, folder: str) -> set[str]:
    paths = (path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(root)) for path in paths}


def test_the_wheel_stays_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 25 * 2**20


def test_the_version_is_written_once(run: RunFunction) -> None:
    code = "import lm_ortho, importlib.metadata as m; print(m.version('lm-ortho'), lm_ortho.__version__)"
    installed_version, package_version = run("-c", code).stdout.split()
    assert installed_version == package_version


def test_kernels_and_tasks_are_found_in_every_installation(run: RunFunction) -> None:
    code = """
import lm_ortho.kernels
from lm_ortho.plugin.bridges import find_tasks_dir
print(len(list(find_tasks_dir().rglob("*.yaml"))))
"""
    assert int(run("-c", code).stdout) == len(list((REPOSITORY / "tasks").rglob("*.yaml")))


def test_the_hook_is_installed_in_every_interpreter_unless_switched_off(run: RunFunction) -> None:
    code = "import sys; print(sum(type(f).__name__ == 'BridgeFinder' for f in sys.meta_path))"
    assert run("-c", code).stdout.strip() == "1"
    assert run("-c", code, LM_ORTHO_AUTOLOAD="0").stdout.strip() == "0"


@pytest.mark.slow  # the index of all tasks of lm-eval takes 20 s in each installation
@pytest.mark.parametrize("python", ["wheel", "editable"], indirect=True)
def test_lm_eval_lists_the_tasks(run: RunFunction) -> None:
    task_list = run(_lm_eval(), "ls", "tasks").stdout
    words = {cell.strip() for line in task_list.splitlines() for cell in line.split("|")}
    assert _task_names() <= words


def test_the_plain_command_runs_the_model(run: RunFunction, tmp_path: Path) -> None:
    command = ["--model", "libortho", "--model_args", "alpha=0", "--tasks", "tofu_forget,tofu_retain"]
    command += ["--limit", "4", "--output_path", str(tmp_path / "out")]
    process = run(_lm_eval(), *command, LM_ORTHO_CACHE=str(tmp_path / "cache"))
    assert "|tofu_forget" in process.stdout
    assert "|tofu_retain" in process.stdout
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["model"] == "libortho"


def test_a_bad_alpha_is_one_line_and_no_traceback(run: RunFunction) -> None:
    code = "import lm_eval; lm_eval.simple_evaluate(model='libortho', model_args='alpha=2', tasks=[])"
    process = run("-c", code.replace("tasks=[]", "tasks=['tofu_forget']"), check=False)
    assert process.returncode == 1
    assert "alpha" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("mode", ["target", "python -S"])
def test_doctor_names_the_cause_of_a_missing_hook(mode: str, wheel: Path, tmp_path: Path) -> None:
    python = _fresh_python(tmp_path / "env")
    target = tmp_path / "target"
    _pip_install(python, "--target", str(target), str(wheel))
    flags = ["-S"] if mode == "python -S" else []
    command = [str(python), *flags, "-m", "lm_ortho", "doctor", "--json"]
    path = os.pathsep.join([str(target), str(LIBRARIES)])
    process = subprocess.run(
        command, env=_environment(PYTHONPATH=path), capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    report = json.loads(process.stdout)
    failed_checks = {check["name"]: check for check in report["checks"] if check["status"] == "fail"}
    assert process.returncode == 1
    assert (report["active"], report["ok"]) == ("none", False)
    assert "--target" in failed_checks["start-up file"]["found"]
    assert ("site" in failed_checks) is (mode == "python -S")
    assert "lm-ortho eval" in failed_checks["way"]["advice"]


def test_the_pins_match_the_declared_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    requirements = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["test"]])
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in requirements:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), str(requirement)
