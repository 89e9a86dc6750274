"""The start-up hook and the bridges: what they add, and that they never break the modules they wait for."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import lm_ortho
from lm_ortho.errors import UserError
from lm_ortho.plugin import bridges, startup
from tests.support.paths import REPOSITORY

PROBE = "lm_ortho_test_probe"
OTHER = "lm_ortho_test_other"


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lets the hook watch ``PROBE`` in place of the real modules; returns the bridge's log."""
    log: list[str] = []

    def bridge(module: ModuleType) -> None:
        log.append(f"{module.__name__} body={getattr(module, 'BODY', None)}")

    monkeypatch.setattr(startup, "WATCHED_MODULES", (PROBE,))
    monkeypatch.setattr(bridges, "BRIDGES", {PROBE: bridge})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not _is_ours(f)])
    monkeypatch.delenv(startup.AUTOLOAD_VARIABLE, raising=False)
    yield log
    for name in (PROBE, OTHER):
        sys.modules.pop(name, None)


def _is_ours(finder: object) -> bool:
    return isinstance(finder, startup.BridgeFinder)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that writes an importable module."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write_module(name: str = PROBE, body: str = "BODY = 1") -> None:
        (tmp_path / f"{name}.py").write_text(body)
        importlib.invalidate_caches()

    return write_module


def test_a_watched_module_is_bridged_once_after_its_body(hook: list[str], write: Callable[..., None]) -> None:
    write()
    startup.install()
    assert hook == []
    importlib.import_module(PROBE)
    importlib.import_module(PROBE)
    assert hook == [f"{PROBE} body=1"]


def test_only_the_one_loader_instance_is_wrapped(hook: list[str], write: Callable[..., None]) -> None:
    write()
    write(OTHER)
    startup.install()
    probe, other = importlib.import_module(PROBE), importlib.import_module(OTHER)
    assert "exec_module" in vars(probe.__spec__.loader)
    assert "exec_module" not in vars(other.__spec__.loader)
    assert len(hook) == 1


def test_a_loader_shared_by_an_archive_bridges_only_the_watched_module(
    hook: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "modules.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{PROBE}.py", "BODY = 1")
        file.writestr(f"{OTHER}.py", "BODY = 2")
    monkeypatch.syspath_prepend(str(archive))
    startup.install()
    importlib.import_module(PROBE)
    importlib.import_module(OTHER)
    assert hook == [f"{PROBE} body=1"]


def test_a_module_already_loaded_is_bridged_at_once(hook: list[str], write: Callable[..., None]) -> None:
    write()
    importlib.import_module(PROBE)
    startup.install()
    assert hook == [f"{PROBE} body=1"]


def test_installing_twice_adds_one_finder(hook: list[str]) -> None:
    startup.install()
    startup.install()
    assert sum(map(_is_ours, sys.meta_path)) == 1
    assert startup.is_installed()


def test_the_switch_keeps_the_hook_out_unless_forced(hook: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.AUTOLOAD_VARIABLE, "0")
    startup.install()
    assert not startup.is_installed()
    startup.install(force=True)
    assert startup.is_installed()


def test_a_failing_bridge_is_a_warning_and_the_module_works(
    hook: list[str], write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: ModuleType) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(bridges, "BRIDGES", {PROBE: fail})
    write()
    startup.install()
    with pytest.warns(RuntimeWarning, match=f"could not extend {PROBE} .*gone.*lm-ortho doctor"):
        module = importlib.import_module(PROBE)
    assert module.BODY == 1


def test_a_loader_that_cannot_be_wrapped_is_a_warning(hook: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen:
        __slots__ = ()

        def create_module(self, spec: object) -> None:
            return None

        def exec_module(self, module: ModuleType) -> None:
            module.BODY = 3  # type: ignore[attr-defined]

    spec = importlib.machinery.ModuleSpec(PROBE, Frozen())
    finder = SimpleNamespace(find_spec=lambda name, path, target: spec if name == PROBE else None)
    startup.install()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
    with pytest.warns(RuntimeWarning, match="could not extend"):
        assert importlib.import_module(PROBE).BODY == 3


def test_errors_of_the_module_itself_pass_through(hook: list[str], write: Callable[..., None]) -> None:
    startup.install()
    with pytest.raises(ModuleNotFoundError, match=PROBE):
        importlib.import_module(PROBE)
    write(body="raise OSError('broken body')")
    with pytest.raises(OSError, match="broken body"):
        importlib.import_module(PROBE)
    assert hook == []


def test_another_finder_of_the_same_kind_does_not_recurse(
    hook: list[str], write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    startup.install()

    class DelegatingFinder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> object:
            finders = (f for f in sys.meta_path if f is not self)
            return next((s for f in finders if (s := f.find_spec(name, path, target))), None)

    monkeypatch.setattr(sys, "meta_path", [sys.meta_path[0], DelegatingFinder(), *sys.meta_path[1:]])
    importlib.import_module(PROBE)
    assert hook == [f"{PROBE} body=1"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lm-eval's registry module with a private copy of the built-in models, without ours."""
    models = importlib.import_module("lm_eval.models")
    module = importlib.import_module("lm_eval.api.registry")
    monkeypatch.setattr(module.model_registry, "_objs", dict(models.MODEL_MAPPING))
    return module


def test_the_model_is_added_beside_the_built_in_ones(registry: ModuleType) -> None:
    bridges.bridge_models(sys.modules["lm_eval.models"])
    bridges.bridge_models(sys.modules["lm_eval.models"])
    assert registry.model_registry._objs["libortho"] == bridges.MODEL_TARGET
    assert "hf" in registry.model_registry


def test_a_model_of_that_name_is_not_replaced(registry: ModuleType) -> None:
    registry.model_registry.register("libortho", target="somebody:Else")
    bridges.bridge_models(sys.modules["lm_eval.models"])
    assert registry.model_registry._objs["libortho"] == "somebody:Else"


def test_an_lm_eval_that_scans_entry_points_gets_no_second_model(
    registry: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "load_plugins", lambda *args: [], raising=False)
    bridges.bridge_models(sys.modules["lm_eval.models"])
    assert "libortho" not in registry.model_registry


def test_the_registered_target_is_the_class_lm_eval_will_register(registry: ModuleType) -> None:
    bridges.bridge_models(sys.modules["lm_eval.models"])
    model = registry.get_model("libortho")
    assert f"{model.__module__}:{model.__name__}" == bridges.MODEL_TARGET


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The task manager module, not bridged, with a small folder in the place of the built-in tasks."""
    module = importlib.import_module("lm_eval.tasks.manager")
    init = module.TaskManager.__init__
    monkeypatch.setattr(module.TaskManager, "__init__", inspect.unwrap(init))
    builtin = tmp_path / "builtin"
    _write_task(builtin, "probe_task", "builtin")
    _write_task(builtin, "other_task", "builtin")
    monkeypatch.setattr(module, "__file__", str(builtin / "manager.py"))
    our_tasks = tmp_path / "ours"
    _write_task(our_tasks, "probe_task", "ours")
    monkeypatch.setattr(bridges, "find_tasks_dir", lambda: our_tasks)
    return module


def _write_task(folder: Path, name: str, owner: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: {owner}\n")


def _get_owner(manager: ModuleType, task: str, *args: object, **kwargs: object) -> str | None:
    entry = manager.TaskManager(*args, **kwargs).task_index.get(task)
    return entry and entry.yaml_path.parent.name


def test_our_tasks_lie_over_the_built_in_and_under_the_users(
    manager: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    user = tmp_path / "user"
    _write_task(user, "probe_task", "user")
    assert _get_owner(manager, "probe_task") == "builtin"
    bridges.bridge_tasks(manager)
    assert _get_owner(manager, "probe_task") == "ours"
    assert _get_owner(manager, "other_task") == "builtin"
    for include_path in (user, str(user), [str(user)], (user,)):
        assert _get_owner(manager, "probe_task", include_path=include_path) == "user"
        assert _get_owner(manager, "probe_task", None, include_path) == "user"
    assert _get_owner(manager, "probe_task", include_path=[user, bridges.find_tasks_dir()]) == "ours"


def test_without_the_defaults_our_tasks_stay_out(manager: ModuleType) -> None:
    bridges.bridge_tasks(manager)
    assert _get_owner(manager, "probe_task", include_defaults=False) is None


def test_the_task_manager_is_wrapped_once(manager: ModuleType) -> None:
    bridges.bridge_tasks(manager)
    init = manager.TaskManager.__init__
    bridges.bridge_tasks(manager)
    assert manager.TaskManager.__init__ is init
    assert bridges.is_bridged(manager.TaskManager)


def test_the_task_folder_is_the_one_of_this_tree() -> None:
    assert bridges.find_tasks_dir() == REPOSITORY / "tasks"


def test_a_missing_task_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lm_ortho, "__path__", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        bridges.find_tasks_dir()


def _run(code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-W", "error:lm-ortho:RuntimeWarning", "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return process.stdout.strip()


def test_model_args_are_checked_before_tasks_are_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lm_eval.config.evaluate_config")
    bridges.bridge_config(module)
    bridges.bridge_config(module)  # twice does no harm
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)  # an index would fail
    config = module.EvaluatorConfig(model="libortho", model_args={"alhpa": 0}, tasks=["tofu_forget"])
    with pytest.raises(UserError, match="alhpa: libortho has no such model arg; did you mean alpha"):
        config.process_tasks({})
    for model, model_args in (("libortho", {"alpha": 0}), ("hf", {"alhpa": 0})):
        with pytest.raises(TypeError):  # both go on to the index
            module.EvaluatorConfig(model=model, model_args=model_args, tasks=["tofu_forget"]).process_tasks({})


def test_every_watched_module_has_a_bridge() -> None:
    assert tuple(bridges.BRIDGES) == startup.WATCHED_MODULES


@pytest.mark.parametrize("order", ["hook first", "lm_eval first"])
def test_a_fresh_interpreter_ends_up_bridged(order: str) -> None:
    hook = "from lm_ortho.plugin import startup; startup.install()"
    lines = [hook, "import lm_eval.models, lm_eval.tasks.manager"]
    if order == "lm_eval first":
        lines.reverse()
    code = "\n".join(
        [
            *lines,
            "from lm_ortho.plugin.bridges import is_bridged",
            "from lm_eval.api.registry import model_registry",
            "print('libortho' in model_registry, 'hf' in model_registry, end=' ')",
            "print(is_bridged(lm_eval.tasks.manager.TaskManager))",
        ]
    )
    assert _run(code) == "True True True"


def test_the_switch_reaches_a_fresh_interpreter() -> None:
    code = "from lm_ortho.plugin import startup; startup.install(); print(startup.is_installed())"
    assert _run(code, LM_ORTHO_AUTOLOAD="0") == "False"
    assert _run(code) == "True"


def test_transformers_learns_our_checkpoint_format() -> None:
    code = """
        from lm_ortho.plugin import startup
        startup.install()
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
        print("libortho" in AUTO_QUANTIZER_MAPPING, "libortho" in AUTO_QUANTIZATION_CONFIG_MAPPING)
    """
    assert _run(code) == "True True"
