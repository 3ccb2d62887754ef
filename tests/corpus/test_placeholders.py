import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.corpus.placeholders import (
    PlaceholderRate,
    compare_placeholders,
    find_placeholders,
    measure_placeholders,
    placeholder_keys,
    replace_placeholders,
    without_placeholders,
)

NAMED = ["%(name)s", "%1", "%2", "{name}", "{0}", "{}", "${var}", "$var", "{{ x }}", "<b>", "\\n"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("%(count)d files in %(folder)s", ("%(count)d", "%(folder)s")),
        ("मैनुअल %(outdir)sमें हैं", ("%(outdir)s",)),
        ("%sपृष्ठ", ("%s",)),
        ("%2$s of %1$s", ("%2$s", "%1$s")),
        ("%-5.2f %05d %lld %zu %@ %*d %.*f %%", "%-5.2f|%05d|%lld|%zu|%@|%*d|%.*f|%%"),
        ("%Y-%m-%d", ("%Y", "%m", "%d")),
        ("Copy %1 to %2", ("%1", "%2")),
        ("%n file(s) and %L1 more", ("%n", "%L1")),
        ("{user} likes {0!r:>5}", ("{user}", "{0!r:>5}")),
        ("{0,number,#.##} of {0,-10:N2}", ("{0,number,#.##}", "{0,-10:N2}")),
        (
            "{n, plural, one {# file} other {# in {place}}} left",
            ("{n, plural, one {# file} other {# in {place}}}",),
        ),
        ("{n, plural, one {never closed", ("{n, plural,",)),
        ("$name and ${place}", ("$name", "${place}")),
        ("{% trans %} {{ var }}", ("{% trans %}", "{{ var }}")),
        ("%PRODUCTNAME is 100% free", ("%PRODUCTNAME",)),
        ("%count% of %PATH%, %{name}", ("%count%", "%PATH%", "%{name}")),
        ("@PACKAGE@ by @author", ("@PACKAGE@", "@author")),
        ('<b>x</b> <a href="%(url)s">y</a><br/>', '<b>|</b>|<a href="%(url)s">|</a>|<br/>'),
        ("<1>Log in</1> or <0/>", ("<1>", "</1>", "<0/>")),
        ("[b]x[/b] file[s]", ("[b]", "[/b]")),
        ("&amp; &#160; &#xA0; &brand.name;", ("&amp;", "&#160;", "&#xA0;", "&brand.name;")),
        (
            "See https://a.org/b_(c). Or (http://d.e/f), now",
            ("https://a.org/b_(c)", "http://d.e/f"),
        ),
        ("https://example.comをご覧 www.x.org!", ("https://example.com", "www.x.org")),
        ("visit example.com/path?x=1.", ("example.com/path?x=1",)),
        ("Mail me.too@example.co.uk.", ("me.too@example.co.uk",)),
        ("one\\ntwo \\t \\u00e9", ("\\n", "\\t", "\\u00e9")),
        ("in C:\\new\\dir now", ("C:\\new\\dir",)),
    ],
)
def test_placeholders_of_every_kind_are_found(text: str, found: tuple[str, ...] | str) -> None:
    expected = found.split("|") if isinstance(found, str) else list(found)
    assert [p.text for p in find_placeholders(text)] == expected


@pytest.mark.parametrize(
    "text",
    [
        "costs 5 $ or 3 %",
        "Save 50%discount now",
        "It costs $US five, or $5",
        "%50 indirim, %100",
        "100 % de réduction",
        "usage: run <file> [options]",
        "R&D; AT&T, Rock&roll, 5 < 6 > 4",
        "Nutzer@innen, Node.js, file.name_v2",
        "{red, green} and { see below }",
    ],
)
def test_similar_texts_are_not_placeholders(text: str) -> None:
    assert find_placeholders(text) == ()


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.text(alphabet="ab1 %{}$<>&@\\/.:;,[]()#=\"'-sdn", max_size=40))
def test_placeholders_are_the_text_at_their_places(text: str) -> None:
    end = 0
    for found in find_placeholders(text):
        assert end <= found.start < found.end
        assert text[found.start : found.end] == found.text
        end = found.end
    parts = [p.text for p in find_placeholders(text)]
    assert replace_placeholders(text, parts) == text


@pytest.mark.parametrize(
    "part",
    [
        "%0",
        "{n, plural, ",
        "<a ",
        '<a "',
        "a.",
        "a",
        "&a",
        "http://",
        "<x>",
        "%(",
        "{",
        "a@",
        "\\",
        "[b]",
        "$a",
        "@a",
        "{ ",
        "{a,",
        "<!--",
        "a.com",
        "(http://x)",
        "%<a",
        "www.",
        "{a[0]",
        "{x(",
    ],
)
def test_a_long_text_of_openings_is_read(part: str) -> None:
    text = part * 8000  # minutes, if time were not linear in the length
    assert replace_placeholders(text, [p.text for p in find_placeholders(text)]) == text


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.sampled_from(NAMED), max_size=4), st.randoms())
def test_reordering_named_placeholders_does_not_change_their_keys(
    names: list[str], shuffler: random.Random
) -> None:
    other = list(names)
    shuffler.shuffle(other)
    assert placeholder_keys(" und ".join(names)) == placeholder_keys(" の ".join(other))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.sampled_from(NAMED), min_size=1, max_size=4))
def test_a_missing_placeholder_changes_the_keys(names: list[str]) -> None:
    assert placeholder_keys(" and ".join(names)) != placeholder_keys(" and ".join(names[1:]))


@pytest.mark.parametrize(
    ("source", "answer", "kept"),
    [
        ("%s has %d", "%2$d von %1$s", True),
        ("%s has %d", "%d von %s", False),  # the arguments are taken in the wrong order
        ("%1$s and %2$s", "%1$s und %1$s", False),
        ("%s and %s", "%s und %s", True),
        ("{n, plural, one {# day} other {# days}}", "{n, plural, few {# d} other {# dni}}", True),
        ("{n, plural, one {# day} other {# days}}", "{m, plural, one {# d} other {# d}}", False),
    ],
)
def test_keys_compare_what_a_program_needs(*, source: str, answer: str, kept: bool) -> None:
    assert (placeholder_keys(source) == placeholder_keys(answer)) is kept


def test_a_rate_counts_texts_and_placeholders() -> None:
    sources = ["Open %s", "<b>Save</b>", "Close", "Quit", "{a} {b}"]
    answers = ["%s öffnen", "<b>Speichern", "Schließen", "Beenden %d", "{a} {a}"]
    assert measure_placeholders(sources, answers) == PlaceholderRate(
        texts=4, kept_texts=1, placeholders=5, kept=3, added=2
    )
    assert measure_placeholders(sources, answers).rate == 0.25
    assert compare_placeholders("Close", "Zu").rate == 1.0


def test_placeholders_are_blanked() -> None:
    assert without_placeholders("Hi %(name)s at www.x.org!") == "Hi   at  !"
