"""A bounded fuzz of every door: whatever a file holds, it is read or refused in words.

The kinds of file are found by walking the package, so a new one cannot come without a row in
``file_doors.py``. ``MOESAIC_FUZZ_EXAMPLES`` makes a campaign of it.
"""

import importlib
import os
import pkgutil
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from file_doors import DOORS, PARTS_OF_STATE, Door, Made, make_files
from hypothesis import given
from hypothesis import strategies as st
from json_damage import damaged_file

import moesaic
from fuzz_settings import bounded
from moesaic.core.errors import UserError
from moesaic.core.file_reader import FileKind, FileShape

HANG_S = 60  # far above the time of any read: a read that does not end
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link")
EVERY = [pytest.param(d, id=f"{d.file}-{i}") for i, d in enumerate(DOORS)]


@pytest.fixture(scope="module")
def valid(data_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_files(tmp_path_factory.mktemp("valid"))


@pytest.fixture
def made(valid: Made, tmp_path: Path) -> Made:
    """A copy that a test may change, in a folder with a neighbour that nothing may touch."""
    shutil.copytree(valid.folder, tmp_path / "a" / "b")
    (tmp_path / "x").write_text("a neighbour")
    return replace(valid, folder=tmp_path / "a" / "b")


def file_kinds() -> list[FileKind]:
    """Every kind of file that a module of the package declares."""
    found: list[FileKind] = []
    for module in pkgutil.walk_packages(moesaic.__path__, "moesaic."):
        if module.name.rpartition(".")[2] == "__main__":
            continue  # runs the command
        try:
            members = dict(vars(importlib.import_module(module.name)))
        except ImportError as error:  # of an optional package, such as triton; never our own
            if str(error.name).startswith("moesaic"):
                raise
            continue
        shapes = [c for c in members.values() if isinstance(c, type) and issubclass(c, FileShape)]
        members |= {f"kind of {c.__name__}": vars(c).get("kind") for c in shapes}
        found += [value for value in members.values() if isinstance(value, FileKind)]
    return found


def test_every_kind_of_file_has_a_door() -> None:
    assert {kind.name for kind in file_kinds()} == {
        *(door.kind.name for door in DOORS),
        *PARTS_OF_STATE,
    }


class _Watch:
    """Records which paths outside of a folder are opened or changed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.touched: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, details: tuple[Any, ...]) -> None:
        if self.folder is None or (event != "open" and event not in WRITES):
            return
        if event in WRITES and isinstance(details[-1], int) and details[-1] >= 0:
            return  # relative to a folder that was opened before
        writes = event in WRITES or bool(details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        for path in details[:2]:
            if isinstance(path, str | os.PathLike) and not (event == "open" and path is details[1]):
                self._check(Path(os.path.abspath(path)), writes)

    def _check(self, path: Path, writes: bool) -> None:
        assert self.folder is not None
        if path.is_relative_to(self.folder) or path == Path(os.devnull):
            return
        if writes or path == Path("/etc/passwd") or path.is_relative_to(self.folder.parents[1]):
            self.touched.append(f"{'written' if writes else 'read'}: {path}")


WATCH = _Watch()


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail if the block does not end, or touches what is not in ``folder``."""

    def hang(*_: object) -> None:
        raise TimeoutError(f"not read within {HANG_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    WATCH.folder, WATCH.touched = folder, []
    try:
        yield
    finally:
        WATCH.folder = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert WATCH.touched == []


def read_or_refuse(door: Door, made: Made) -> None:
    message = ""
    try:
        with watched(made.folder):
            door.read(made)
    except UserError as error:
        message = str(error)
    assert len(message) < 4_000


@pytest.mark.parametrize("door", EVERY)
def test_a_valid_file_is_read(door: Door, made: Made) -> None:
    if door.file.startswith("plugins/"):
        with pytest.raises(UserError, match="needs the plug-in"):
            door.read(made)
    else:
        with watched(made.folder):
            door.read(made)


@pytest.mark.parametrize("door", EVERY)
@bounded(15)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(door: Door, made: Made, data: st.DataObject) -> None:
    path = made.folder / door.file
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged_file(content, door.form)))
    try:
        read_or_refuse(door, made)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("door", EVERY)
@pytest.mark.parametrize("other", ["directory", "link", "fifo", "missing", "empty"])
def test_another_thing_of_that_name_is_read_or_refused(door: Door, other: str, made: Made) -> None:
    path = made.folder / door.file
    path.unlink()
    match other:
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(made.folder.parents[1] / "x")
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case _:
            assert other == "missing"
    read_or_refuse(door, made)
