import errno
import os
from pathlib import Path

import pytest

from moesaic.core.errors import FileError
from moesaic.core.file_reader import FileKind, read_json
from moesaic.core.files import atomic_write, make_dir, removed_on_error, sha256, write_json


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
    with pytest.raises(FileError, match=r"state.json: cannot be written: no space left"):
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
    assert read_json(path, FileKind(name="test file", max_bytes=100)) == {"b": ["ჯ"], "a": 1.5}
    assert "ჯ" in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("\n")


def test_a_hash_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256(path).startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("file/x", "a part of this path is a file|something else is there"),
        ("n" * 300, "too long"),
        ("folder", "found a folder"),
        ("a\0b", "not a file name"),
    ],
)
def test_a_path_that_cannot_be_written_is_named_with_the_reason(
    tmp_path: Path, path: str, found: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=found):
        atomic_write(tmp_path / path, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_surrogate_in_a_text_is_written_as_the_replacement_character(tmp_path: Path) -> None:
    atomic_write(tmp_path / "x", "a\ud800b한")
    assert "�" in (tmp_path / "x").read_text(encoding="utf-8")
    assert (tmp_path / "x").read_text(encoding="utf-8").endswith("b한")


def test_a_directory_whose_name_is_no_utf8_is_refused(tmp_path):
    """Training wrote into it for its whole length, and then nothing could open the weights."""
    path = tmp_path / os.fsdecode(b"run-\xff")
    with pytest.raises(FileError, match="not a file name"):
        make_dir(path)
    assert not path.exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_directory_that_was_not_found_right_is_removed(error, tmp_path):
    (made := tmp_path / "made").mkdir()
    with pytest.raises(error), removed_on_error(made):
        raise error
    assert not made.exists()
