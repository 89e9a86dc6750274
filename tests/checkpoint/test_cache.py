"""The cache of decompositions: keys, order of use, size limit; unrelated files are never touched."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import stat
import time

import pytest
import torch
from typer.testing import CliRunner

from lm_ortho.checkpoint import cache, is_checkpoint, load, read_meta, save
from lm_ortho.checkpoint.manifest import read_manifest
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError, printable
from lm_ortho.files import is_locked, lock_folder, make_private_directory
from lm_ortho.layer import alpha_scope
from tests.support import tiny
from tests.support.hostile import HOSTILE_NAMES

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LM_ORTHO_CACHE_LIMIT_GB", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return tiny.patched_model(tiny.llama(num_hidden_layers=1))


def set_age(key, seconds_ago):
    """Sets the age of an entry."""
    timestamp = time.time() - seconds_ago
    for name in (".last_used", "manifest.json"):
        os.utime(cache.entry_path(key) / name, (timestamp, timestamp))


def test_place(root, monkeypatch):
    assert cache.cache_dir() == root
    monkeypatch.setenv("LM_ORTHO_CACHE", "")
    assert "lm-ortho" in str(cache.cache_dir())


def test_keys():
    key = cache.compute_key({"weights": "abc", "recipe": {"density": 0.01, "bits": 4}})
    assert key == cache.compute_key({"recipe": {"bits": 4, "density": 0.01}, "weights": "abc"})
    assert len(key) == 64
    assert key != cache.compute_key({"weights": "abc", "recipe": {"density": 0.02, "bits": 4}})
    assert key != cache.compute_key({"weights": "abc", "recipe": {"density": "0.01", "bits": 4}})
    with pytest.raises(ValueError, match="plain JSON"):
        cache.compute_key({"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match="plain JSON"):
        cache.compute_key({"density": float("nan")})
    for bad in ("", "../up", "A" * 64, key[:-1]):
        with pytest.raises(ValueError, match="not a cache key"):
            cache.entry_path(bad)


def test_store_and_lookup(root, model):
    key = cache.compute_key({"n": 1})
    assert cache.lookup(key) is None
    path = cache.store(key, model, meta={"recipe": {"bits": 4}}, description="a test")
    assert path == cache.lookup(key) == (root / key).resolve()
    assert is_checkpoint(path)
    assert is_checkpoint(root / key)
    assert read_meta(path)["recipe"] == {"bits": 4}
    with alpha_scope(1.0):
        assert torch.equal(tiny.logits(load(path)), tiny.logits(model))
    (entry,) = cache.list_entries()
    assert (entry.key, entry.path, entry.description) == (key, path, "a test")
    assert entry.bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert abs(entry.created - time.time()) < 60
    assert entry.last_used >= entry.created
    assert sorted(entry.name for entry in root.iterdir()) == [path.parent.name, key]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_only_the_owner_may_read_at_any_moment(root, model, monkeypatch, umask):
    """While the tensors are written the folder is private already, whatever the umask is."""
    modes = []

    def save_and_look(directory, *arguments):
        modes.append(stat.S_IMODE(directory.parent.stat().st_mode))
        return save(directory, *arguments)

    monkeypatch.setattr("lm_ortho.checkpoint.cache.save", save_and_look)
    before = os.umask(umask)
    try:
        path = cache.store(cache.compute_key({"n": 1}), model)
    finally:
        os.umask(before)
    assert modes == [0o700]
    assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_failed_store_leaves_the_older_version(root, model, monkeypatch):
    key = cache.compute_key({"n": 1})
    path = cache.store(key, model, description="first")

    def fail(directory, *_):
        directory.mkdir()
        (directory / "base.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        cache.store(key, model, description="second")
    assert cache.lookup(key) == path
    assert sorted(entry.name for entry in root.iterdir()) == [path.parent.name, key]


def assert_whole(path):
    """Every file of the checkpoint is there, with the hash of its manifest."""
    for name, record in read_manifest(path).files.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == record.sha256, name


def store_often(key, model, errors):
    """A process that replaces the entry 10 times."""
    for number in range(10):
        try:
            cache.store(key, model, description=f"{os.getpid()} {number}")
        except BaseException as error:
            errors.put(f"writer: {type(error).__name__}: {error}")


def read_often(key, is_over, errors, reads):
    """A process that looks the entry up and verifies all its files, until the others have ended."""
    while not is_over.is_set():
        try:
            path = cache.lookup(key)
            assert path is not None, "no entry"
            assert_whole(path)
        except BaseException as error:
            errors.put(f"reader: {type(error).__name__}: {error}")
        reads.value += 1


@pytest.mark.skipif(os.name != "posix", reason="processes share the model by fork")
def test_two_writers_and_a_reader_that_always_finds_a_whole_entry(model):
    """Before the switch was atomic the reader found no entry twice, and once a half one, in 543 reads."""
    key = cache.compute_key({"n": 1})
    cache.store(key, model)
    processes = multiprocessing.get_context("fork")
    errors, is_over, reads = processes.SimpleQueue(), processes.Event(), processes.Value("i", 0)
    reader = processes.Process(target=read_often, args=(key, is_over, errors, reads))
    writers = [processes.Process(target=store_often, args=(key, model, errors)) for _ in range(2)]
    for process in (reader, *writers):
        process.start()
    for process in writers:
        process.join()
    is_over.set()
    reader.join()
    assert errors.empty(), errors.get()
    assert reads.value > 50
    assert cache.list_entries()[0].description.endswith(" 9")


def test_a_version_that_is_read_survives_its_replacement(root, model):
    key = cache.compute_key({"n": 1})
    first = cache.store(key, model, description="first")
    assert cache.lookup(key) == first
    second = cache.store(key, model, description="second")
    assert cache.lookup(key) == second != first
    assert_whole(first)
    assert [entry.path for entry in cache.list_entries()] == [second]
    make_old(first.parent, 2 * 3600)
    cache.evict()
    assert not first.parent.exists()
    assert_whole(second)


def make_old(folder, seconds):
    timestamp = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (timestamp, timestamp), follow_symlinks=False)


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_leftovers_of_killed_writers_are_swept_and_live_writers_are_not(root, model):
    key = cache.compute_key({"n": 1})
    cache.store(key, model)
    live, killed = (root / f".{key}.version-{n * 12}" for n in "12")
    for path in (live, killed):
        path.mkdir()
        (path / "base.safetensors").write_bytes(b"half")
        make_old(path, 48 * 3600)
    with lock_folder(live):
        cache.evict()
        assert live.exists()
        assert not killed.exists()
        cache.clear()
        assert live.exists()
    cache.evict()
    assert list(root.iterdir()) == []


def test_the_lock_of_a_killed_process_ends_with_it(root):
    folder = root / f".{'a' * 64}.version-123456789abc"
    folder.mkdir(parents=True)
    processes = multiprocessing.get_context("fork")
    started = processes.Event()

    def hold():
        with lock_folder(folder):
            started.set()
            time.sleep(60)

    writer = processes.Process(target=hold)
    writer.start()
    started.wait()
    assert is_locked(folder) is True
    writer.kill()
    writer.join()
    assert is_locked(folder) is False


def test_without_locks_a_leftover_stays_for_a_day(root, monkeypatch):
    monkeypatch.setattr(cache, "is_locked", lambda _: None)
    fresh, old = (root / f".{'a' * 64}.version-{n * 12}" for n in "12")
    for path, hours in ((fresh, 23), (old, 25)):
        path.mkdir(parents=True)
        make_old(path, hours * 3600)
    cache.evict()
    assert [entry.name for entry in root.iterdir()] == [fresh.name]


def test_an_entry_of_the_earlier_layout(root, model):
    """The folder itself was the checkpoint: it is found, listed, replaced and deleted."""
    key = cache.compute_key({"n": 1})

    def make_earlier_entry():
        make_private_directory(root)
        return save(root / key, model, None, {"description": "earlier"})

    assert make_earlier_entry() == cache.lookup(key)
    assert [(entry.path, entry.description) for entry in cache.list_entries()] == [(root / key, "earlier")]
    path = cache.store(key, model, description="new")
    assert cache.lookup(key) == path
    assert [entry.description for entry in cache.list_entries()] == ["new"]
    cache.clear()
    assert list(root.iterdir()) == []
    make_earlier_entry()
    assert [entry.key for entry in cache.clear()] == [key]
    assert list(root.iterdir()) == []


def test_a_file_system_without_links(root, model, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    key = cache.compute_key({"n": 1})
    for description in ("first", "second"):
        path = cache.store(key, model, description=description)
        assert path == cache.lookup(key) == root / key
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert_whole(path)
    assert [entry.description for entry in cache.list_entries()] == ["second"]


def test_a_link_to_nothing_is_no_entry(root):
    root.mkdir()
    key = cache.compute_key({"n": 1})
    (root / key).symlink_to(f".{key}.version-123456789abc/checkpoint")
    assert cache.lookup(key) is None
    assert cache.list_entries() == []
    cache.evict()
    assert list(root.iterdir()) == []


def test_storing_again_replaces(model):
    key = cache.compute_key({"n": 1})
    cache.store(key, model, description="first")
    cache.store(key, model, description="second")
    assert [entry.description for entry in cache.list_entries()] == ["second"]


def test_a_lookup_refreshes_an_entry(model):
    keys = [cache.compute_key({"n": n}) for n in range(3)]
    for age, key in zip((300, 200, 100), keys, strict=True):
        cache.store(key, model)
        set_age(key, age)
    assert [entry.key for entry in cache.list_entries()] == keys
    cache.lookup(keys[0])
    assert [entry.key for entry in cache.list_entries()] == [keys[1], keys[2], keys[0]]


def test_the_oldest_entries_are_evicted(model, monkeypatch):
    keys = [cache.compute_key({"n": n}) for n in range(4)]
    for age, key in zip((300, 200, 100), keys[:3], strict=True):
        cache.store(key, model)
        set_age(key, age)
    size = cache.list_entries()[0].bytes
    monkeypatch.setenv("LM_ORTHO_CACHE_LIMIT_GB", str(2.5 * size / 10**9))
    cache.store(keys[3], model)
    assert [entry.key for entry in cache.list_entries()] == [keys[2], keys[3]]
    monkeypatch.setenv("LM_ORTHO_CACHE_LIMIT_GB", "0")
    cache.store(keys[0], model)
    assert [entry.key for entry in cache.list_entries()] == [keys[0]]  # the entry just written stays
    assert [entry.key for entry in cache.evict()] == [keys[0]]


def test_limit(monkeypatch):
    assert cache.size_limit() == 20 * 10**9
    monkeypatch.setenv("LM_ORTHO_CACHE_LIMIT_GB", "1.5")
    assert cache.size_limit() == 1_500_000_000
    for bad in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv("LM_ORTHO_CACHE_LIMIT_GB", bad)
        with pytest.raises(UserError, match="LM_ORTHO_CACHE_LIMIT_GB"):
            cache.size_limit()


def test_clear_deletes_only_entries(root, model):
    key = cache.compute_key({"n": 1})
    cache.store(key, model)
    (root / "letters").mkdir()
    (root / "letters" / "dear.txt").write_text("mine")
    stale_directory = root / f".{key}.tmp-0123456789ab"
    shutil.copytree(root / key, stale_directory)
    assert [entry.key for entry in cache.clear()] == [key]
    assert [entry.name for entry in root.iterdir()] == ["letters"]
    assert cache.clear() == []


def test_stale_files_of_an_interrupted_write_are_deleted_after_a_day(root):
    fresh, old = (root / f".{'a' * 64}.tmp-{n * 12}" for n in "12")
    for path in (fresh, old):
        path.mkdir(parents=True)
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    cache.evict()
    assert [entry.name for entry in root.iterdir()] == [fresh.name]


def test_a_damaged_entry_is_listed_but_no_hit(model):
    key = cache.compute_key({"n": 1})
    path = cache.store(key, model)
    (path / "manifest.json").write_text("{")
    assert [entry.description for entry in cache.list_entries()] == ["(damaged)"]
    (path / "manifest.json").unlink()
    assert cache.lookup(key) is None
    assert cache.store(key, model, description="complete again") == cache.lookup(key)


def test_the_list_prints_descriptions_as_text(model):
    """They come from the manifest of an entry."""
    for number, name in enumerate(HOSTILE_NAMES[:4]):
        cache.store(cache.compute_key({"n": number}), model, description=name)
    result = CliRunner().invoke(app, ["cache", "list"], env={"COLUMNS": "300"}, catch_exceptions=False)
    assert result.exit_code == 0
    for name in HOSTILE_NAMES[:4]:
        assert printable(name) in result.stdout
    assert "\x1b" not in result.stdout
    assert "\x1b" not in CliRunner().invoke(app, ["cache", "list", "--json"]).stdout
    assert CliRunner().invoke(app, ["cache", "clear"]).exit_code == 0


def test_no_cache_yet():
    assert cache.list_entries() == []
    assert cache.clear() == []
    assert cache.evict() == []
