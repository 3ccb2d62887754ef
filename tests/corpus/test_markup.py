import pytest

from moesaic.corpus.markup import strip_accelerators, strip_tags, unescape_entities


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
        ('E&xit <a href="?a&b">', 'Exit <a href="?a&b">'),
        ("_Open https://x.org/a_b", "Open https://x.org/a_b"),
        ("&nbsp;_File", "&nbsp;File"),
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
