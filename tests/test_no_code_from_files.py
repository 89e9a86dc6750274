"""No code from a file is run: templates, pickles, YAML tags and a model's own classes do nothing unless asked for."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_ortho import checkpoint
from lm_ortho.checkpoint.contents import read_contents
from lm_ortho.checkpoint.export import export
from lm_ortho.data.chat import render_forms
from lm_ortho.data.rows import Row, read_rows
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, load_tokenizer, merge_adapter
from lm_ortho.finetune.train import FinetunePlan, fine_tune
from lm_ortho.leaderboard.config import read_board
from lm_ortho.leaderboard.evaluation import make_task_manager
from lm_ortho.runtime.progress import no_progress
from lm_ortho.runtime.resume import ResumeFolder, load_state
from tests.support import tiny
from tests.support.board import BOARD
from tests.support.checkpoint import tokenizer
from tests.support.paths import REPOSITORY

FOLDERS = ("lm_ortho", "kernels", "scripts", "experiments", "benchmarks", "hatch_build.py")
PICKLE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
QUESTION = [Row(question="Where?", answer="Here.")]


class Payload:
    """A pickle of it makes the folder ``marker`` when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A path that exists after code of a file has run; the test fails if it does."""
    path = tmp_path / "code has run"
    yield path
    assert not path.exists()


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()
    torch.save({"steps": Payload(tmp_path / "ran too")}, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert (tmp_path / "ran too").is_dir()


# ---------------------------------------------------------------- the source


def dotted_name(function: ast.expr) -> str:
    """The name of a function such as ``torch.load``; ``?.load`` where it is an attribute of a result."""
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join(reversed([*parts, function.id if isinstance(function, ast.Name) else "?"]))


@lru_cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call of the source: its place, the function's name, and the call."""
    all_calls = []
    for folder in FOLDERS:
        path = REPOSITORY / folder
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
                    all_calls.append((place, dotted_name(node.func), node))
    return all_calls


def test_no_call_runs_what_it_reads() -> None:
    """``eval`` and the like, pickles, full YAML loaders and shells are used nowhere."""
    bad = []
    for place, name, call in calls():
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        is_bad = (
            name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
            or name.partition(".")[0] in PICKLE_MODULES
            or (name.endswith("torch.load") and options.get("weights_only") != "True")
            or (name.startswith("yaml.") and "load" in name and name != "yaml.safe_load" and "Loader" not in options)
            or (name == "yaml.load" and "Safe" not in options.get("Loader", "").title() and "Loader" in options)
            or options.get("shell") == "True"
            or options.get("allow_pickle") == "True"
            or options.get("trust_remote_code") == "True"
        )
        bad += [f"{place} {name}"] if is_bad else []
    assert bad == []


def test_only_the_page_is_a_template() -> None:
    """Text of users is a value of a template and never the template itself."""
    templates = [place for place, name, _ in calls() if name.endswith(("from_string", "Template", "render_template"))]
    assert [place.partition(":")[0] for place in templates] == ["lm_ortho/leaderboard/report/page.py"]


# ---------------------------------------------------------------- templates

DANGEROUS_TEMPLATES = (
    "{{{{ cycler.__init__.__globals__.os.mkdir({path!r}) }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir({path!r}) }}}}",
    "{{{{ messages.append(1) }}}}{{{{ raise_exception.__globals__['os'].mkdir({path!r}) }}}}",
    "{{% for i in range(1000000000) %}}x{{% endfor %}}",
    "{{{{ namespace.__init__.__globals__ }}}}",
)


@pytest.mark.parametrize("template", DANGEROUS_TEMPLATES)
def test_a_chat_template_has_no_access_to_python(template: str, marker: Path) -> None:
    chat_tokenizer = tokenizer()
    chat_tokenizer.chat_template = template.format(path=str(marker))
    with pytest.raises(UserError, match="the chat template of the tokenizer fails") as error_info:
        render_forms(QUESTION, chat_tokenizer, "chat")
    assert len(str(error_info.value)) < 500


def test_rows_are_no_templates(marker: Path) -> None:
    chat_tokenizer = tokenizer()
    chat_tokenizer.chat_template = "{{ messages[0].content }}"
    text = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }} {question}"
    (row,) = render_forms([Row(question=text, answer="Here.")], chat_tokenizer, "chat")
    assert row.context == text


def test_rows_are_no_templates_of_a_task(tmp_path: Path, marker: Path) -> None:
    """lm-eval renders the texts of a task's YAML without a sandbox, with rows as values."""
    text = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
    row = {"question": f"Q {text}?", "answer": f"A {text}.", "secret": text}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    manager = make_task_manager(["forget_set"], {"forget": str(tmp_path / "rows.jsonl")})
    (task,) = manager.load(["forget_set"])["tasks"].values()
    (doc,) = task.eval_docs
    assert text in task.doc_to_text(doc)
    assert text in task.doc_to_target(doc)


# ---------------------------------------------------------------- pickles


def test_a_saved_state_is_no_pickle(tmp_path: Path, marker: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, write_state in enumerate((torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2)))):
        state = tmp_path / "run" / f"{number}.pt"
        state.parent.mkdir(exist_ok=True)
        write_state({"steps": Payload(marker)}, state)
        assert load_state(state) is None
        assert ResumeFolder(tmp_path / "run").load(str(number)) is None
    assert "cannot be read and is not used" in caplog.text


def test_training_starts_again_where_its_state_is_a_pickle(tmp_path: Path, marker: Path) -> None:
    torch.save({"steps": Payload(marker), "trained": [], "optimiser": {}}, tmp_path / "state.pt")
    model = tiny.llama(num_hidden_layers=1)
    fine_tune(model, [], FinetunePlan(steps=0), no_progress, state=tmp_path / "state.pt")


def test_weights_are_no_pickle(home: Path, tmp_path: Path, marker: Path) -> None:
    model = Path(shutil.copytree(home / "plain", tmp_path / "model"))
    for file in model.glob("*.safetensors*"):
        file.unlink()
    torch.save({"lm_head.weight": Payload(marker)}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="pretrained="):
        load_causal_lm(model)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"base_model.model.q_proj.lora_A.weight": Payload(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="peft="):
        merge_adapter(load_causal_lm(home / "plain"), str(adapter))


# ---------------------------------------------------------------- YAML and rows


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!function"])
def test_a_tag_in_a_board_is_refused(tag: str, tmp_path: Path, marker: Path) -> None:
    (tmp_path / "board.yaml").write_text(f"{BOARD}\ntitle: {tag} [{str(marker)!r}]\n")
    with pytest.raises(UserError, match="board="):
        read_board(tmp_path / "board.yaml")


def test_rows_are_values(tmp_path: Path, marker: Path) -> None:
    text = f"__import__('os').mkdir({str(marker)!r})"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": text, "answer": text, "py/object": "os.mkdir"}))
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row.question == text


# ---------------------------------------------------------------- a model's own code


def add_own_code(directory: Path, marker: Path, model_type: str | None) -> None:
    """Adds code to a model that makes ``marker`` when it is imported, and names it wherever transformers looks."""
    code = (
        f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class ForCausalLM(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
        "def generate(model, *arguments, **options):\n    return None\n"
    )
    for name in ("evil.py", "custom_generate/generate.py"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(code)
    classes = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.ForCausalLM",
        "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    }
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((directory / file).read_text())
        content |= {"auto_map": classes} | ({"model_type": model_type} if model_type and file == "config.json" else {})
        (directory / file).write_text(json.dumps(content))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers copies a model's code into a folder of the test, which is forgotten afterwards."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("sys.path", list(sys.path))
    forget_modules()
    yield
    forget_modules()


def forget_modules() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def try_every_way(directory: Path, out: Path, **options: Any) -> None:
    """Calls whatever reads a decomposed checkpoint; some of it may be refused."""
    ways: list[Callable[[], object]] = [
        lambda: checkpoint.load(directory, **options),
        lambda: read_contents(directory, **options),
        lambda: export(directory, out, **options),
        lambda: load_tokenizer(str(directory), **options),
    ]
    for way in ways:
        with suppress(UserError):
            way()


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("model_type", [None, "evil"])
def test_own_code_of_a_checkpoint_does_nothing(directory: Path, tmp_path: Path, marker: Path, model_type: Any) -> None:
    meta = checkpoint.read_meta(directory)
    add_own_code(directory, marker, model_type)
    checkpoint.manifest.write_manifest(directory, meta)
    try_every_way(directory, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.py"))


@pytest.mark.usefixtures("modules")
def test_own_code_runs_where_it_is_asked_for(directory: Path, tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    meta = checkpoint.read_meta(directory)
    add_own_code(directory, tmp_path / "ran", "evil")
    checkpoint.manifest.write_manifest(directory, meta)
    try_every_way(directory, tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "ran").is_dir()


def test_a_kernel_that_a_configuration_names_is_not_fetched(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would take attention from a repository of the hub."""
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *_, **__: pytest.fail("fetched"))
    meta = checkpoint.read_meta(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel:run"}
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint.manifest.write_manifest(directory, meta)
    with suppress(UserError):
        checkpoint.load(directory)
