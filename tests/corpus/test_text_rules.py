import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import DataError
from moesaic.corpus.text_rules import (
    GeneralText,
    SoftwareStrings,
    TextRules,
    normalise_text,
    read_text_rules,
    write_text_rules,
)

# characters that earlier versions kept, or that text from elsewhere often has
ODD = "\0\x07\x1c\x85\xa0\xad\u200b\u200c\u200d\u2028\u2060\u3000\ufeff\uffff\ud83de\u0301กข_&~<b>;"


@pytest.mark.parametrize(
    "between", ["\n", "\r\n", "\x85", "\u2028", "\u2029", "\xa0", "\u202f", "\t "]
)
def test_white_space_of_any_kind_becomes_one_space(between: str) -> None:
    assert normalise_text(f" Open{between}the file{between}") == "Open the file"


@pytest.mark.parametrize(
    "mark", ["\0", "\x07", "\x7f", "\x9f", "\xad", "\ufeff", "\u2060", "\u200b"]
)
def test_a_character_without_a_glyph_within_a_word_changes_nothing(mark: str) -> None:
    assert normalise_text(f"{mark}Ab{mark}laufen") == "Ablaufen"


@pytest.mark.parametrize(
    "text", ["\u200b", "\ufeff", "\0", "\u2060 \xad", "\u200d", "\u200e\u200f", "\ufe0f"]
)
def test_a_line_without_a_visible_character_is_empty(text: str) -> None:
    assert normalise_text(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",
        "क्\u200dष",
        "👩\u200d👩\u200d👧 家",
        "❤\ufe0f",
        "ไทย\u200bภาษา",
        "\u2067עברית\u2069",
        "\ue000",
    ],
)
def test_joiners_emoji_and_word_divisions_are_kept(text: str) -> None:
    assert normalise_text(text) == text


def test_decomposed_text_equals_composed_text() -> None:
    composed = "Öffne die Tür für Zoë, ガギグ, Việt"
    assert normalise_text(unicodedata.normalize("NFD", composed)) == composed
    assert (
        normalise_text("Tu\xad\u0308r") == "Tür"
    )  # the mark follows its letter once U+00AD is gone


def test_a_lone_surrogate_becomes_the_sign_of_broken_text() -> None:
    assert normalise_text("Nice \ud83d day") == "Nice \ufffd day"


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=[])), max_size=30))
def test_a_normalised_text_is_encodable_one_line_of_nfc_and_stays_as_it_is(text: str) -> None:
    done = normalise_text(text)
    assert done == normalise_text(done) == unicodedata.normalize("NFC", done)
    assert done.encode().decode().splitlines() in ([done], [])
    assert GeneralText().normalise(done, other="other") == done


@pytest.mark.parametrize(
    "text",
    [
        "It is ~5 km away",
        "Rock&roll is here",
        "The Q&As are online",
        "Set _foo first",
        "file.name_v2",
        "a &amp; b",
        "<b>x</b>",
    ],
)
def test_general_text_keeps_the_marks_of_software_strings(text: str) -> None:
    assert GeneralText().normalise(text) == text


@pytest.mark.parametrize("text", ["Save 50%discount now", "It costs $US five", "He said {laughs}"])
def test_general_text_has_no_placeholders(text: str) -> None:
    assert GeneralText().placeholders(text) == ()
    assert GeneralText().without_placeholders(text) == text


@pytest.mark.parametrize(
    "text", ["_Open the file", "<b>Open the file</b>", "Open&nbsp;the file", "&Open the\nfile"]
)
def test_a_software_string_alone_loses_its_markup(text: str) -> None:
    assert SoftwareStrings().normalise(text) == "Open the file"


def test_a_mark_within_a_word_of_a_text_alone_is_kept() -> None:
    assert SoftwareStrings().normalise("Invalid file_name") == "Invalid file_name"
    assert SoftwareStrings().normalise("Sa_ve", other="Speichern") == "Save"


PIECES = [
    "&amp;",
    "&lt;b&gt;",
    "<b>",
    "&",
    "_",
    "~",
    "x",
    "e\u0301",
    "\xad",
    "\0",
    " ",
    "\u200b",
    "(_F)",
]


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.lists(st.sampled_from([*PIECES, "amp;", "\u1160"]), max_size=7), st.sampled_from(PIECES))
@pytest.mark.parametrize("rules", [SoftwareStrings(), SoftwareStrings(tags="keep")])
def test_a_row_of_a_corpus_stays_as_it_is_when_it_is_translated(
    rules: SoftwareStrings, pieces: list[str], other: str
) -> None:
    row = rules.normalise("".join(pieces), other=other)
    assert rules.normalise(row) == row
    alone = rules.normalise("".join(pieces))
    assert rules.normalise(alone) == alone


def test_text_about_markup_that_is_escaped_twice_is_read_once_for_all() -> None:
    row = SoftwareStrings().normalise("Use &amp;lt;b&amp;gt;bold&amp;lt;/b&amp;gt;", other="x")
    assert row == SoftwareStrings().normalise(row) == "Use bold"


def test_tags_are_a_choice_of_software_strings() -> None:
    kept, stripped = SoftwareStrings(tags="keep"), SoftwareStrings()
    assert kept.normalise("<b>_Save</b> &amp; go", other="") == "<b>Save</b> & go"
    assert stripped.normalise("<b>_Save</b> &amp; go", other="") == "Save & go"
    assert kept.normalise("<b>Save</b> &amp; go") == "<b>Save</b> &amp; go"  # to translate


@pytest.mark.parametrize("rules", [GeneralText(), SoftwareStrings(), SoftwareStrings(tags="keep")])
def test_a_record_of_the_rules_is_read_back(rules: TextRules, tmp_path: Path) -> None:
    write_text_rules(tmp_path / "rules.json", rules)
    assert read_text_rules(tmp_path / "rules.json") == rules


def test_a_run_without_a_record_was_made_with_software_strings(tmp_path: Path) -> None:
    assert read_text_rules(tmp_path / "none.json") == SoftwareStrings()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kind": "Nothing"}', "[" * 100_000, '{"kind": []}', "\0"]
)
def test_a_damaged_record_is_an_error_that_names_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"rules\.json"):
        read_text_rules(tmp_path / "rules.json")
