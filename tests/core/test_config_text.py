import pytest

from moesaic.core.config_text import flat_lines, parse_call, quoted_call, set_by_path, write_yaml
from moesaic.core.errors import ConfigError
from moesaic.core.yaml_reader import read_yaml


@pytest.mark.parametrize(
    "text", ["", "a b", "f(1)", "f(x=)", "3", "[1]", "a.b", "f(x=1+g())", "f("]
)
def test_what_is_no_call_is_none(text: str) -> None:
    assert parse_call(text) is None


def test_a_call_holds_words_numbers_lists_and_calls() -> None:
    assert parse_call("A(x=1e-3, y=[1, two], z=B(w=null), on=true, t='a b', n=-1)") == {
        "kind": "A", "x": 1e-3, "y": [1, "two"], "z": {"kind": "B", "w": None},
        "on": True, "t": "a b", "n": -1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("A(folder=/scratch)", 'A(folder="/scratch")'),
        ("A(x=B(folder=~/x-y.z), k=1e-3)", 'A(x=B(folder="~/x-y.z"), k=1e-3)'),
        ("A(k=2)", None),
        ("A(k=2", None),
        ("A(folder=/a b)", None),
    ],
)
def test_a_text_without_quotes_is_shown_with_them(text: str, quoted: str | None) -> None:
    assert quoted_call(text) == quoted


def test_a_call_runs_nothing() -> None:
    assert parse_call("A(x=__import__('os'))") is None


def test_yaml_keeps_the_order_and_the_script() -> None:
    text = write_yaml({"b": "Größe", "a": "ჯ"})
    assert text == "b: Größe\na: ჯ\n"
    assert list(read_yaml(text)) == ["b", "a"]


def test_a_repeated_yaml_key_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r'"b" is repeated.*line 3'):
        read_yaml("a:\n  b: 1\n  b: 2\n")


def test_assigning_to_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="a has no places"):
        set_by_path({"a": []}, "a.0=1")


def test_flat_lines_of_nested_lists() -> None:
    assert flat_lines({"a": [[1, 2], [3]], "b": [], "c": {"x": "no"}}) == [
        "a.0 = [1, 2]",
        "a.1 = [3]",
        "b = []",
        "c.x = 'no'",
    ]
