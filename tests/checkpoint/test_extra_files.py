"""An export copies a tokenizer, and a model's own code on request, whatever the files of a checkpoint say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lm_ortho.checkpoint.export import export
from lm_ortho.checkpoint.extra_files import copy_extra_files, is_code_file, is_tokenizer_file
from lm_ortho.checkpoint.manifest import FileRecord
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError

SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside every checkpoint."""
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def record_of(path: Path) -> FileRecord:
    return FileRecord(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


def list_in_manifest(directory: Path, *names: str) -> None:
    """Adds files to the manifest with their right hashes, as a hostile author would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in names:
        record = record_of(directory / name)
        manifest["files"][name] = {"sha256": record.sha256, "bytes": record.bytes}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def sound_export(saved_checkpoint, tmp_path: Path) -> dict[str, bytes]:
    """The files of an export of the unchanged checkpoint."""
    export(saved_checkpoint[1], tmp_path / "sound")
    return contents(tmp_path / "sound")


@pytest.mark.parametrize("name", ["tokenizer.model", "chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_an_unlisted_link_to_a_private_key_is_refused(directory, secret, tmp_path, name):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"{name} is a link that leads out of the checkpoint"):
        export(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_link_is_refused(directory, secret, tmp_path):
    (secret.parent / "a.jinja").write_text(SECRET)
    (directory / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(UserError, match=r"additional_chat_templates/a\.jinja is a link that leads out"):
        export(directory, tmp_path / "out")


def test_a_generation_configuration_elsewhere_is_refused(directory, tmp_path):
    (tmp_path / "docker.json").write_text('{"auths": "secret"}')
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"]["generation_config.json"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "generation_config.json").unlink()
    (directory / "generation_config.json").symlink_to(tmp_path / "docker.json")
    with pytest.raises(UserError, match=r"generation_config\.json is a link that leads out of the checkpoint"):
        export(directory, tmp_path / "out")


def test_a_listed_link_has_the_content_of_its_record(saved_checkpoint, directory, tmp_path, sound_export):
    """So are the files of the hub cache."""
    blobs = tmp_path / "store"
    blobs.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(directory / name, blobs / name)
        (directory / name).symlink_to(blobs / name)
    export(directory, tmp_path / "out")
    assert contents(tmp_path / "out") == sound_export
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_an_unlisted_tokenizer_in_the_hub_cache(directory, tmp_path):
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--someone--model" / "blobs"
    shutil.copytree(directory, snapshot)
    blobs.mkdir()
    (blobs / "1f").write_text("pieces")
    (snapshot / "spiece.model").symlink_to("../../blobs/1f")
    export(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "spiece.model").read_text() == "pieces"


def test_links_inside_the_checkpoint(directory, tmp_path):
    (directory / "pieces").write_text("pieces")
    (directory / "spiece.model").symlink_to("pieces")
    export(directory, tmp_path / "out")
    assert (tmp_path / "out" / "spiece.model").read_text() == "pieces"


def test_what_is_no_file_is_refused_and_not_waited_for(directory, tmp_path):
    os.mkfifo(directory / "spiece.model")
    with pytest.raises(UserError, match=r"spiece\.model is not a regular file"):
        export(directory, tmp_path / "out")
    (directory / "spiece.model").unlink()
    (directory / "spiece.model").symlink_to("spiece.model")
    with pytest.raises(UserError, match=r"spiece\.model"):
        export(directory, tmp_path / "out")


HOSTILE_NAMES = (
    "CONFIG.JSON",
    "Config.json",
    "model.pt",
    "optimizer.pkl",
    "modeling_evil.py",
    "sub/modeling_evil.py",
    "sub/config.json",
    "TOKENIZER.JSON",
    ".bashrc",
    "run.sh",
)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_listed_files_that_are_no_tokenizer_stay_out(directory, tmp_path, sound_export, trust_remote_code):
    for name in HOSTILE_NAMES:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"architectures": ["Evil"]}')
    list_in_manifest(directory, *HOSTILE_NAMES)
    result = export(directory, tmp_path / "out", trust_remote_code=trust_remote_code)
    code = [name for name in HOSTILE_NAMES if trust_remote_code and name.endswith(".py")]
    files = contents(tmp_path / "out")
    assert sorted(files) == sorted([*sound_export, *code])
    assert {name: files[name] for name in sound_export} == sound_export
    assert set(result.left_out) == set(HOSTILE_NAMES) - set(code)


def test_the_command_names_what_stays_out(directory, tmp_path):
    (directory / "a\x1b[31m.bin").write_bytes(b"x")
    list_in_manifest(directory, "a\x1b[31m.bin")
    result = CliRunner().invoke(app, ["export", str(directory), str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "left out 1 file that is not a tokenizer's: a\\x1b[31m.bin" in result.output


def test_an_adapter_is_no_tokenizer(tmp_path):
    """transformers would load it on top of the exported model."""
    (tmp_path / "target").mkdir()
    (tmp_path / "adapter_config.json").write_text("{}")
    assert copy_extra_files(tmp_path, tmp_path / "target", {}, ["adapter_config.json"], with_code=True) == []


def test_a_file_that_changes_after_the_check_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "source" / "vocab.txt").write_text("a")
    record = record_of(tmp_path / "source" / "vocab.txt")
    (tmp_path / "source" / "vocab.txt").write_text("b")
    with pytest.raises(UserError, match=r"vocab\.txt was changed after it was written"):
        copy_extra_files(tmp_path / "source", tmp_path / "target", {"vocab.txt": record})
    (tmp_path / "source" / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"vocab\.txt is missing"):
        copy_extra_files(tmp_path / "source", tmp_path / "target", {"vocab.txt": record})


def test_files_that_were_written_are_not_replaced(tmp_path):
    for folder in ("source", "target"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "vocab.txt").write_text(folder)
    assert copy_extra_files(tmp_path / "source", tmp_path / "target", {}, ["vocab.txt"]) == []
    assert (tmp_path / "target" / "vocab.txt").read_text() == "target"
    (tmp_path / "target" / "vocab.txt").rename(tmp_path / "target" / "Vocab.TXT")  # one file where case is ignored
    assert copy_extra_files(tmp_path / "source", tmp_path / "target", {}, ["vocab.txt"]) == []


def test_names_of_tokenizer_files_of_transformers():
    names = (
        "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt "
        "merges.txt spiece.model sentencepiece.bpe.model tokenizer.model spm_char.model qwen.tiktoken "
        "chat_template.jinja chat_template.json bpe.codes entity_vocab.json word_shape.json "
        "prophetnet.tokenizer vocab-src.json dict.txt target_vocab.json normalizer.json emoji.json source.spm "
        "additional_chat_templates/tools.jinja tekken.json "
    ).split()
    assert [name for name in names if not is_tokenizer_file(name)] == []


PARTS = st.sampled_from(["..", ".", "", "a", "tokenizer.model", "config.json", "modeling.py", "\n", "\\", "~", "C:"])


@given(st.lists(PARTS, min_size=1, max_size=4).map("/".join))
def test_a_name_is_normalised_or_stays_out(name: str) -> None:
    if is_tokenizer_file(name) or is_code_file(name):
        assert name.isprintable()
        assert not {"", ".", ".."} & set(name.split("/"))
        assert "\\" not in name
        assert os.path.normpath(name) == name
