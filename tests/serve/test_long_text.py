import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.serve.long_text import SplitSentences, TextPart, Truncate, join_translations


def _count(texts):
    """One token for each character, spaces left out."""
    return [len(text.replace(" ", "")) for text in texts]


def _split(text, limit):
    return SplitSentences().parts(text, limit=limit, count=_count)


def _shown(parts):
    return [(part.text, part.boundary) for part in parts]


def test_a_text_within_the_limit_stays_whole():
    assert _shown(_split("One. Two. Three.", 20)) == [("One. Two. Three.", "sentence")]


def test_every_sentence_of_a_long_text_is_a_part():
    assert [p.text for p in _split("One. Two. Three.", 6)] == ["One.", "Two.", "Three."]


def test_a_long_sentence_is_cut_at_clauses_then_at_words_then_inside():
    assert _shown(_split("Yes. Aaa bbb, ccc ddd, eee. Go on.", 12)) == [
        ("Yes.", "sentence"),
        ("Aaa bbb,", "clause"),
        ("ccc ddd, eee.", "sentence"),
        ("Go on.", "sentence"),
    ]
    assert _shown(_split("aa bb cc dd", 4)) == [("aa bb", "word"), ("cc dd", "sentence")]
    assert _shown(_split("abcdefgh", 4)) == [("abcd", "inside"), ("efgh", "sentence")]
    assert _shown(_split("ฉันไปตลาด", 5)) == [("ฉันไ", "word"), ("ปตลาด", "sentence")]


def test_no_placeholder_tag_or_url_is_cut():
    for whole in ('<a href="x, y" title="A. B">', "https://a.b/c?d=e,f.g", "%(two words)s"):
        text = f"Open the {whole} here now. Then close all, save it"
        for limit in (len(whole), len(whole) + 3, len(whole) + 9):
            assert any(whole in part.text for part in _split(text, limit)), (whole, limit)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.text(alphabet="ab. ,。、ก\u0301", max_size=60), st.integers(1, 9))
def test_nothing_is_lost_and_every_part_that_can_be_cut_fits(text, limit):
    text = " ".join(text.split())
    parts = _split(text, limit)
    assert "".join(p.text for p in parts).replace(" ", "") == text.replace(" ", "")
    for part, size in zip(parts, _count([p.text for p in parts]), strict=True):
        assert size <= limit or set(part.text[1:]) == {"\u0301"}


def test_truncation_reads_one_part():
    assert Truncate().parts("One. Two.", limit=2, count=_count) == [TextPart("One. Two.")]


@pytest.mark.parametrize(
    ("target", "joined"),
    [
        ("de", "A B CDE"),
        ("zh_Hans", "ABCDE"),
        ("ja", "ABCDE"),
        ("th", "A B CDE"),
        ("ko", "A B CDE"),
    ],
)
def test_parts_are_joined_as_the_target_language_separates_them(target, joined):
    cuts = ("sentence", "clause", "inside", "inside", "sentence")
    parts = [TextPart(name, cut) for name, cut in zip("abcde", cuts, strict=True)]
    assert join_translations(list("ABCDE"), parts=parts, target=target) == joined


def test_a_cut_between_words_has_no_space_in_scripts_without_any():
    parts = [TextPart("a", "word"), TextPart("b")]
    joined = {
        to: join_translations(["A", "B"], parts=parts, target=to) for to in ("de", "th", "ja")
    }
    assert joined == {"de": "A B", "th": "AB", "ja": "AB"}
    assert join_translations(["", "B"], parts=parts, target="de") == "B"
