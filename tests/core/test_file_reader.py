import os
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from moesaic.core.errors import DataError
from moesaic.core.file_reader import (
    FileKind,
    FileShape,
    iter_lines,
    read_json,
    read_text,
    require_inside,
)

KIND = FileKind(
    name="test file", max_bytes=10_000, max_values=100, max_line=50, error=DataError, way_out="stop"
)


class Shape(FileShape):
    kind: ClassVar[FileKind] = KIND
    step: int = Field(ge=0, le=100)
    names: tuple[str, ...] = ()
    score: float = 0.0


def written(folder: Path, data: bytes) -> Path:
    path = folder / "x.json"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not a test file"),
        (b"[" * 9_000, "about 9,000 values"),
        (b'{"a":' * 90, "not a test file.*EOF"),
        (b"\xff\xfe", "not a test file"),
        (b'"\\ud800"', "not a test file"),
        (b"1" * 5_000, "out of range"),
        (b"1" * 400, "a whole number of about 399 digits, expected a number of 64 bits"),
        (b"[" + b"1," * 200 + b"1]", "about 201 values"),
        (b" " * 10_001, "at most"),
    ],
)
def test_a_file_beyond_a_limit_is_refused_with_its_name(
    tmp_path: Path, data: bytes, found: str
) -> None:
    with pytest.raises(DataError, match=rf"x\.json: .*{found}.*; stop"):
        read_json(written(tmp_path, data), KIND)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"[1]", "expected a mapping"),
        (b"{}", "step: missing"),
        (b'{"step": "3"}', 'step: found "3", expected a whole number'),
        (b'{"step": true}', "step: found true"),
        (b'{"step": 101}', "expected at most 100"),
        (b'{"step": ' + b"9" * 400 + b"}", "step: found a whole number of about 400 digits"),
        (b'{"step": 1, "names": "a"}', "names: found"),
        (b'{"step": 1, "names": ["a", null]}', "names.1: found nothing"),
        (b'{"step": 1, "score": NaN}', "finite"),
        (b'{"step": 1, "score": 1e999}', "finite"),
    ],
)
def test_a_field_is_checked_for_kind_and_range_before_it_is_used(
    tmp_path: Path, data: bytes, found: str
) -> None:
    with pytest.raises(DataError, match=found):
        Shape.read(written(tmp_path, data))


def test_a_file_that_fits_is_read_and_unknown_keys_are_ignored(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"step": 7, "names": ["a"], "new": {}}'
    assert Shape.read(written(tmp_path, data)) == Shape(step=7, names=("a",))


def test_what_is_no_regular_file_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="not a regular file"):
            read_text(path, KIND)


def test_text_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: byte 0xe9, expected UTF-8"):
        read_text(written(tmp_path, b"a\ncaf\xe9 b"), KIND)


def test_a_line_beyond_the_limit_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = written(tmp_path, b"short\n" + b"x" * 9_000)
    lines = iter_lines(path, KIND)
    assert next(lines) == (0, b"short\n")
    with pytest.raises(DataError, match="a line at byte 6 is longer than"):
        next(lines)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "", "a\\b", "C:x", "a\0b", None, 3, "n" * 300]
)
def test_a_name_in_a_file_stays_inside_its_folder(tmp_path: Path, name: object) -> None:
    with pytest.raises(DataError, match=r"found .*expected"):
        require_inside(tmp_path, name, kind=KIND, where=tmp_path / "index.json")


def test_a_link_may_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "out").write_text("x")
    (folder / "in").write_text("x")
    (folder / "good").symlink_to("in")
    (folder / "bad").symlink_to("../out")
    (folder / "circle").symlink_to("circle")
    assert require_inside(folder, "good", kind=KIND, where=folder) == folder / "good"
    with pytest.raises(DataError, match="a link that leads out"):
        require_inside(folder, "bad", kind=KIND, where=folder)
    with pytest.raises(DataError, match="links"):
        require_inside(folder, "circle", kind=KIND, where=folder)
