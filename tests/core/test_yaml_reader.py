from pathlib import Path

import pytest

from moesaic.core.config_text import set_by_path
from moesaic.core.errors import ConfigError
from moesaic.core.yaml_reader import read_yaml, read_yaml_file

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOMB, "more than 50,000 values"),
        ("x: &x {<<: [*x, *x]}", "refers to the value that contains it"),
        ("a: &a [*a]", "refers to the value that contains it"),
        ("[" * 5_000, "nested deeper than 50"),
        ("- " * 5_000, "nested deeper than 50"),
        ("a: " + "9" * 5_000, "is no int"),
        ("a: " + "9" * 400, "64 bits"),
        ("a: !!int x", "is no int"),
        ("a: !!float x", "is no float"),
        ("a: !!bool x", "is no bool"),
        ("a: !!int [1]", "is no int"),
        ("!!map x", "is no map"),
        ("a: !!timestamp bad", "the tag"),
        ("a: !!binary x", "the tag"),
        ("a: !!python/object/apply:os.system [x]", "the tag"),
        ("? [a]\n: 1", "expected a name"),
        ("a: " + "x" * 600_000, "600,003 characters"),
    ],
)
def test_a_text_beyond_a_limit_is_refused_with_its_place(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"not valid YAML: .*{found}"):
        read_yaml(text)
    with pytest.raises(ConfigError, match=found):
        set_by_path({}, f"a={text}")


def test_words_and_dates_stay_text() -> None:
    text = "[no, on, yes, 2024-02-30, 2024-01-01, 12:30:45, 1e3, true, 0x10, 1_000, -1.5, .inf]"
    words = ["no", "on", "yes", "2024-02-30", "2024-01-01", "12:30:45", "1e3"]
    assert read_yaml(text) == [*words, True, 16, 1000, -1.5, float("inf")]


def test_an_alias_within_the_limits_is_read() -> None:
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {
        "a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1},
    }  # fmt: skip


def test_a_config_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for data, found in ((b"\xff\xfe", "byte 0xff"), (b"a: na\xefve", "byte 0xef"), (b"\0", "YAML")):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=rf"c\.yaml: .*{found}"):
            read_yaml_file(path)


@pytest.mark.parametrize(
    "change", [".".join("a" * 2_000) + "=1", "a.²=1", "a." + "9" * 5_000 + "=1"]
)
def test_a_path_of_any_length_or_number_is_refused(change: str) -> None:
    with pytest.raises(ConfigError):
        set_by_path({"a": [1]}, change)
