import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.corpus.placeholders import placeholder_keys
from moesaic.corpus.readers.fluent import parse_fluent

PAGE = """\
# A comment
menu-quit = Quit
    .label = Quit { -brand-short-name }
    .accesskey = Q
-brand-short-name = Mosaic
long =
    The first line
      and an indented one.

    After a gap.
tabs =
    { $count ->
        [one] One tab
       *[other] { NUMBER($count) } tabs
    } open
"""


def read(text: str) -> dict[str, str]:
    return {k.key: k.text for k in parse_fluent(text)}


def test_messages_attributes_and_terms_are_read_under_their_keys() -> None:
    assert read(PAGE) == {
        "menu-quit": "Quit",
        "menu-quit.label": "Quit {-brand-short-name}",
        "menu-quit.accesskey": "Q",
        "-brand-short-name": "Mosaic",
        "long": "The first line\n  and an indented one.\n\nAfter a gap.",
        "tabs": "{$count} tabs open",
    }


def test_the_default_variant_of_a_selector_is_read_and_its_key_recorded() -> None:
    [found] = [k for k in parse_fluent(PAGE) if k.key == "tabs"]
    assert found.invariants == ("other",)
    nested = "m = { $a ->\n  *[x] { $b ->\n    [y] no\n   *[z] yes\n   }!\n   [w] no\n }"
    [found] = parse_fluent(nested)
    assert (found.text, found.invariants) == ("yes!", ("x", "z"))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("{ $user }", "{$user}"),
        ("{$user}", "{$user}"),
        ('{ DATETIME($date, month: "long") }', "{$date}"),
        ('{ -brand(case: "genitive") }', "{-brand}"),
        ("{ other-message.title }", "{other-message.title}"),
        ('{ "{" } { "\\u0041" } { "\\"" }', '{ A "'),
        ("{ 3 } { 2.5 }", "3 2.5"),
        ("{ { $x } }", "{$x}"),
        ('a { "->" } b', "a -> b"),
    ],
)
def test_a_placeable_is_a_placeholder_or_its_text(written: str, text: str) -> None:
    assert read(f"m = {written}") == {"m": text}


def test_placeables_are_found_by_the_placeholder_rule() -> None:
    found = read('m = { $x } { -y(case: "a") } { NUMBER($z) } { a-b.c }')["m"]
    assert placeholder_keys(found) == tuple(sorted(["{$x}", "{-y}", "{$z}", "{a-b.c}"]))


@pytest.mark.parametrize(
    "junk", ["bad = { $x", "bad = { $n ->\n    [one] only\n }", "= no key", "bad = { ? }", "{"]
)
def test_junk_is_skipped_and_the_next_message_is_read(junk: str) -> None:
    assert read(f"{junk}\nnext = Well\n")["next"] == "Well"
    assert "bad" not in read(f"{junk}\nnext = Well\n")


def test_variants_may_start_a_line() -> None:
    assert read("m = { $n ->\n[one] a tab\n*[other] tabs\n}\nb = Two") == {"m": "tabs", "b": "Two"}


def test_a_comment_ends_a_message() -> None:
    assert read("a = One\n# about b\n    two\nb = Two") == {"a": "One", "b": "Two"}


@settings(deadline=None)
@given(st.text(alphabet='ab={}$-.[]*> "\\\n#_1', max_size=60))
def test_no_text_raises(text: str) -> None:
    list(parse_fluent(text))


def test_a_message_nested_too_deeply_for_the_parser_is_left_out_alone():
    deep = "{ " * 3000 + "}" * 3000
    found = list(parse_fluent(f"first = one\nbad = {deep}\nlast = two\n"))
    assert [item.text for item in found if item.key != "bad"] == ["one", "two"]
