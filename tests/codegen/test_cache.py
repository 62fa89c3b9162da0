"""The kernel cache on disk: round trips, damage, directories that cannot be used."""

from __future__ import annotations

import errno
import os
import pathlib
import threading
from pathlib import Path
from typing import Any

import pytest

from wsp_compiler.codegen import cache

ENTRY = {"object": bytes(range(256)) * 5, "text": "é".encode(), "empty": b""}
KEY = cache.cache_key("kernel", "script")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory that does not exist yet."""
    monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path / "deep" / "kernels"))
    return tmp_path / "deep" / "kernels"


def test_an_entry_comes_back_as_it_was_stored(folder: Path):
    assert cache.load(KEY) is None
    cache.store(KEY, ENTRY)
    assert cache.load(KEY) == ENTRY
    assert [file.name for file in folder.iterdir()] == [KEY]
    cache.store(KEY, {"object": b"newer"})
    assert cache.load(KEY) == {"object": b"newer"}


def test_keys_separate_their_parts():
    keys = {
        cache.cache_key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("abc", ""), ("c", "ab"))
    }
    assert len(keys) == 5
    assert all(len(key) == 64 for key in keys)


def test_the_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WSP_CACHE_DIR", "/somewhere")
    assert cache.cache_directory() == Path("/somewhere")
    monkeypatch.delenv("WSP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    found = cache.cache_directory()
    assert found is not None
    assert found.name == "kernels"
    assert "wsp_compiler" in found.parts


def test_an_empty_directory_name_turns_the_cache_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WSP_CACHE_DIR", "")
    monkeypatch.chdir(tmp_path)
    cache.store(KEY, ENTRY)
    assert cache.load(KEY) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", [0, 10, len(cache.MAGIC) + 3, len(cache.MAGIC) + 40, -1])
def test_a_changed_byte_is_noticed(position: int, folder: Path, caplog: pytest.LogCaptureFixture):
    cache.store(KEY, ENTRY)
    data = bytearray((folder / KEY).read_bytes())
    data[position] ^= 1
    (folder / KEY).write_bytes(data)
    assert cache.load(KEY) is None
    assert "unusable" in caplog.text


def test_every_truncation_is_noticed(folder: Path):
    data = cache.encode({"object": b"12", "text": b"3"})
    assert cache.decode(data) == {"object": b"12", "text": b"3"}
    for length in range(len(data)):
        with pytest.raises(ValueError, match="checksum"):
            cache.decode(data[:length])
    with pytest.raises(ValueError, match="checksum"):
        cache.decode(data + b"\0")


def test_something_else_under_the_name_is_no_entry(folder: Path):
    (folder / KEY).mkdir(parents=True)
    assert cache.load(KEY) is None
    cache.store(KEY, ENTRY)  # a directory cannot be replaced: logged, not raised
    assert not [file for file in folder.iterdir() if file.is_file()]


def test_a_file_in_the_directorys_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path / name))
        assert cache.load(KEY) is None
        cache.store(KEY, ENTRY)
    assert caplog.text.count("not writable") == 2


@pytest.mark.parametrize("call", ["mkdir", "mkstemp", "write", "replace"])
def test_an_unwritable_directory_costs_nothing_but_the_entry(
    call: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Mocked, since a privileged user may write anywhere."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC if call == "write" else errno.EACCES, "refused")

    targets = {
        "mkdir": (pathlib.Path, "mkdir"),
        "mkstemp": (cache.tempfile, "mkstemp"),
        "write": (cache, "encode"),
        "replace": (cache.os, "replace"),
    }
    monkeypatch.setattr(*targets[call], refuse)
    cache.store(KEY, ENTRY)
    assert "not writable" in caplog.text
    monkeypatch.undo()
    assert not folder.exists() or not list(folder.iterdir())


def test_an_unreadable_entry_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cache.store(KEY, ENTRY)

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "refused", str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    assert cache.load(KEY) is None


def test_an_interrupted_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.store(KEY, ENTRY)
    assert list(folder.iterdir()) == []


def test_readers_never_see_half_an_entry(folder: Path, caplog: pytest.LogCaptureFixture):
    """Writers replace the entry while readers load it: every answer is one of the entries written."""
    entries = [{"object": bytes([number]) * 200_000} for number in range(4)]
    cache.store(KEY, entries[0])
    stop = threading.Event()

    def write(entry: dict[str, bytes]) -> None:
        while not stop.is_set():
            cache.store(KEY, entry)

    writers = [threading.Thread(target=write, args=(entry,)) for entry in entries]
    for writer in writers:
        writer.start()
    found = [cache.load(KEY) for _ in range(100)]
    stop.set()
    for writer in writers:
        writer.join()
    assert all(entry in entries for entry in found)
    assert caplog.text == ""
    assert os.listdir(folder) == [KEY]
