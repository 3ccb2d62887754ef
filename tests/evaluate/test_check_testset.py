"""Odd rows of test sets are said, and text is normalised as training text."""

import pytest

from moesaic.corpus.text_rules import GeneralText, SoftwareStrings
from moesaic.evaluate.check_testset import normalise_testset, notes_on_testset
from moesaic.evaluate.testset import TestSet, read_testset


def _test(sources, references):
    return TestSet(
        name="mine", source="eng_Latn", target="deu_Latn",
        sources=tuple(sources), references=tuple(references),
    )  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [("source", "target"), ("en", "de"), ("English", "German"), ("src_text", "Reference"),
     ("English", "Translation"), ("Source sentence", "target-text"), ("eng_Latn", "deu_Latn")],
)  # fmt: skip
def test_a_header_row_is_said(row):
    assert "looks like a header" in " ".join(notes_on_testset(_test([row[0]], [row[1]])))


@pytest.mark.parametrize(
    "row", [("Open", "Öffnen"), ("Text editor", "Texteditor"), ("German", "Deutsch"), ("", "x")]
)
def test_an_ordinary_first_row_is_no_header(row):
    assert "header" not in " ".join(notes_on_testset(_test([row[0]], [row[1]])))


def test_empty_sides_are_counted_with_their_rows():
    notes = " ".join(notes_on_testset(_test(["a", "", " ", "d"], ["a", "b", "c", ""])))
    assert "2 of 4 sources are empty (rows 2, 3)" in notes
    assert "1 of 4 references are empty (row 4)" in notes


def test_references_of_the_file_are_kept_where_they_were_changed():
    raw = _test(["u\u0308ber\u00adall"], ["a\u00a0b &amp; c"])
    general = normalise_testset(raw, GeneralText())
    assert (general.sources, general.references) == (("überall",), ("a b &amp; c",))
    assert general.raw_references == raw.references
    assert normalise_testset(raw, SoftwareStrings()).references == ("a b & c",)
    clean = normalise_testset(_test(["a"], ["b"]), GeneralText())
    assert (clean.raw_references, clean.notes) == ((), ())


def test_pairs_of_other_languages_in_a_file_are_left_out_and_reversed_ones_are_turned(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"translation": {"en": "one", "de": "eins"}}\n'
        '{"translation": {"de": "zwei", "en": "two"}}\n',
        encoding="utf-8",
    )
    found = read_testset(path, source="en", target="de")
    assert found.sources == ("one", "two")
    assert found.references == ("eins", "zwei")
