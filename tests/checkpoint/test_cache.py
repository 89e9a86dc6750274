"""The cache of decompositions: keys, order of use, size limit; unrelated files are never touched."""

from __future__ import annotations

import os
import shutil
import stat
import time

import pytest
import torch

from lm_ortho.checkpoint import cache, is_checkpoint, load, read_meta
from lm_ortho.errors import UserError
from lm_ortho.layer import alpha_scope
from tests.support import tiny

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
    assert path == cache.lookup(key) == root / key
    assert is_checkpoint(path)
    assert read_meta(path)["recipe"] == {"bits": 4}
    with alpha_scope(1.0):
        assert torch.equal(tiny.logits(load(path)), tiny.logits(model))
    (entry,) = cache.list_entries()
    assert (entry.key, entry.path, entry.description) == (key, path, "a test")
    assert entry.bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert abs(entry.created - time.time()) < 60
    assert entry.last_used >= entry.created
    assert [entry.name for entry in root.iterdir()] == [key]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_only_the_owner_may_read(root, model):
    path = cache.store(cache.compute_key({"n": 1}), model)
    assert stat.S_IMODE(root.stat().st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o700


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
    cache.store(key, model, description="complete again")
    assert cache.lookup(key) == path


def test_no_cache_yet():
    assert cache.list_entries() == []
    assert cache.clear() == []
    assert cache.evict() == []
