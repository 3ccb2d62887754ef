import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.corpus.markup import placeholders, strip_accelerators, strip_tags, unescape_entities

HOLDERS = ["%(name)s", "%s", "%d", "%1$s", "%1", "{name}", "{0}", "{}", "${var}", "$var", "{{ x }}"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("%(count)d files in %(folder)s", ("%(count)d", "%(folder)s")),
        ("मैनुअल %(outdir)sमें हैं", ("%(outdir)s",)),
        ("%sपृष्ठ", ("%s",)),
        ("%2$s of %1$s", ("%s", "%s")),
        ("Copy %1 to %2", ("%1", "%2")),
        ("{user} likes {0!r:>5}", ("{0!r:>5}", "{user}")),
        ("$name and ${place}", ("$name", "${place}")),
        ("{% trans %} {{ var }}", ("{% trans %}", "{{ var }}")),
        ("%PRODUCTNAME is 100% free", ("%PRODUCTNAME",)),
        ("costs 5 $ or 3 %", ()),
    ],
)
def test_placeholders_of_every_kind_are_found(text: str, found: tuple[str, ...]) -> None:
    assert placeholders(text) == found


@settings(deadline=None)
@given(st.lists(st.sampled_from(HOLDERS), max_size=4), st.randoms())
def test_reordering_placeholders_does_not_change_their_set(holders: list[str], random) -> None:
    other = list(holders)
    random.shuffle(other)
    assert placeholders(" und ".join(holders)) == placeholders(" の ".join(other))


@settings(deadline=None)
@given(st.lists(st.sampled_from(HOLDERS), min_size=1, max_size=4))
def test_a_missing_placeholder_changes_the_set(holders: list[str]) -> None:
    assert placeholders(" and ".join(holders)) != placeholders(" and ".join(holders[1:]))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("_File", "File"),
        ("Save _As…", "Save As…"),
        ("E_xit", "Exit"),
        ("&Open", "Open"),
        ("Sa~ve", "Save"),
        ("ファイル(_F)", "ファイル"),
        ("ヘルプ (&H)", "ヘルプ"),
        ("R&D", "R&D"),
        ("Terms & Conditions", "Terms & Conditions"),
        ("in ~/config", "in ~/config"),
        ("%(user_name)s", "%(user_name)s"),
        ("a_b_c", "a_b_c"),
    ],
)
def test_accelerators_are_removed_and_similar_marks_are_kept(text: str, plain: str) -> None:
    assert strip_accelerators(text) == plain


def test_an_identifier_on_both_sides_is_kept() -> None:
    assert strip_accelerators("Invalid file_name.", other="Ungültiger file_name.") == (
        "Invalid file_name."
    )


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ('<a href="x">Click</a> here', "Click here"),
        ("one<br/>two", "one two"),
        ("<para>One.</para><nl/>Two.", " One.  Two."),
        ("usage: run <file> [options]", "usage: run <file> [options]"),
        ("<guilabel>OK</guilabel>", "OK"),
        ("a < b and c > d", "a < b and c > d"),
    ],
)
def test_tags_are_removed_and_similar_texts_are_kept(text: str, plain: str) -> None:
    assert strip_tags(text) == plain


def test_entities_are_decoded() -> None:
    assert unescape_entities("Caf&eacute; &amp; bar &lt;x&gt;") == "Café & bar <x>"
