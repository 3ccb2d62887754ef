import errno
import os
from pathlib import Path

import pytest

from moesaic.core.files import atomic_write, read_json, sha256, write_json


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a" / "b.txt", "Größe\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "Größe\n".encode()


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "state.json"
    atomic_write(path, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_whole_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    atomic_write(path, b"old")
    seen: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.read_bytes()))
    atomic_write(path, b"new")
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"


def test_json_round_trips_and_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": ["ჯ"], "a": 1.5})
    assert read_json(path) == {"b": ["ჯ"], "a": 1.5}
    assert "ჯ" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("\n")


def test_a_hash_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256(path).startswith("ba7816bf8f01cfea414140de5dae2223")
