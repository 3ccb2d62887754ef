"""Catalogues are read by their header: plural formula, charset, escapes, comments."""

import gettext
import io
import struct
import sys

import pytest
from catalogue_files import mo_bytes

from moesaic.core.errors import UserError
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.gettext import CatalogueEntry, UnknownPlural, parse_mo, parse_po
from moesaic.corpus.readers.plural_forms import parse_plural_forms

ARABIC = (
    "nplurals=6; plural=n==0 ? 0 : n==1 ? 1 : n==2 ? 2 : n%100>=3 && n%100<=10 ? 3 : "
    "n%100>=11 ? 4 : 5;"
)
SLOVENIAN = "nplurals=4; plural=(n%100==1 ? 1 : n%100==2 ? 2 : n%100==3 || n%100==4 ? 3 : 0);"
LATVIAN = (
    "nplurals=3; plural=(n % 10 == 0 || n % 100 >= 11 && n % 100 <= 19) ? 0 : "
    "((n % 10 == 1 && n % 100 != 11) ? 1 : 2);"
)
RUSSIAN = (
    "nplurals=3; plural=(n%10==1 && n%100!=11 ? 0 : n%10>=2 && n%10<=4 && "
    "(n%100<10 || n%100>=20) ? 1 : 2);"
)


def po(body: str, *fields: str, charset: str = "UTF-8") -> bytes:
    head = [f"Content-Type: text/plain; charset={charset}", *fields]
    lines = "".join(f'"{field}\\n"\n' for field in head)
    return f'msgid ""\nmsgstr ""\n{lines}\n{body}'.encode(charset)


def read(data: bytes) -> list[tuple[str, str]]:
    return [
        (e.source, e.target) for e in parse_po(data, name="a.po") if isinstance(e, CatalogueEntry)
    ]


def plural_entry(count: int) -> str:
    forms = "".join(f'msgstr[{i}] "form {i}"\n' for i in range(count))
    return f'msgid "one"\nmsgid_plural "many"\n{forms}'


@pytest.mark.parametrize(
    ("formula", "one", "many"),
    [
        (ARABIC, 1, 4),
        (SLOVENIAN, 1, 0),
        (LATVIAN, 1, 2),
        (RUSSIAN, 0, 2),
        ("nplurals=2; plural=n != 1;", 0, 1),
        ("nplurals=2; plural=(n > 1)", 0, 1),
        ("nplurals=1; plural=0;", 0, 0),
        ("nplurals=2; plural=n==1||n%10==1 ? 0 : 1;", 0, 1),  # Macedonian
        ("nplurals=2; plural=!(n-1) ? 1 : 0;", 1, 0),
    ],
)
def test_the_forms_for_one_and_for_most_numbers_follow_the_formula(
    formula: str, one: int, many: int
) -> None:
    count = int(formula[9])
    found = read(po(plural_entry(count), f"Plural-Forms: {formula}"))
    assert found == [("one", f"form {one}"), ("many", f"form {many}")]


@pytest.mark.parametrize("formula", [ARABIC, SLOVENIAN, LATVIAN, RUSSIAN])
def test_a_compiled_catalogue_has_the_same_plural_pairs(formula: str) -> None:
    forms = [f"form {i}" for i in range(int(formula[9]))]
    header = f"Content-Type: text/plain; charset=UTF-8\nPlural-Forms: {formula}\n"
    data = mo_bytes({b"": header.encode(), b"one\0many": "\0".join(forms).encode()})
    found = [e for e in parse_mo(data, name="a.mo") if isinstance(e, CatalogueEntry)]
    other = gettext.GNUTranslations(io.BytesIO(data))
    assert found[0].target == other.ngettext("one", "many", 1)
    assert [other.ngettext("one", "many", n) for n in range(2, 201)].count(found[1].target) > 60


@pytest.mark.parametrize(
    "formula",
    [
        "1+2*n==3&&!0 ? 5 : 6",
        "n%10==1&&n%100!=11 ? 0 : n!=0 ? 1 : 2",
        "n==0 ? 0 : n==1 ? 1 : (n%100>=3) ? 2 : 3",
        "7/2-1",
        "1<2==1",
        "10-4-3",
        "!n",
        "1 ? 2 ? 3 : 4 : 5",
    ],
)
def test_operators_bind_as_pythons_gettext_reads_them(formula: str) -> None:
    mine = parse_plural_forms(f"nplurals=99; plural={formula};").singular
    assert mine == int(gettext.c2py(formula)(1))  # type: ignore[attr-defined]


def test_numbers_are_unsigned_and_what_is_not_computed_does_not_divide() -> None:
    assert parse_plural_forms("nplurals=2; plural=n-2>0;").singular == 1
    assert parse_plural_forms("nplurals=2; plural=n ? 1 : 1/0;").singular == 1
    assert parse_plural_forms("nplurals=2; plural=1 || n/0;").singular == 1


@pytest.mark.parametrize(
    "field",
    [
        "",
        "nplurals=INTEGER; plural=EXPRESSION;",
        "nplurals=3; plural=n/0;",
        "nplurals=3; plural=n%(n-n);",
        "nplurals=3; plural=(n;",
        "nplurals=3; plural=n n;",
        "nplurals=3; plural=7;",
        "nplurals=3; plural=__import__('os');",
        "nplurals=3; plural=n**9;",
        "nplurals=3; plural=" + "(" * 900 + "n" + ")" * 900,
        "nplurals=3; plural=" + "n+" * 900 + "n",
        "nplurals=3; plural=" + "((((" * 12 + "n" + "+1+1+1+1+1+1+1+1+1)" * 48,
        "nplurals=3; plural=n" + " " * 5000 + ";",
    ],
)
def test_a_header_without_a_usable_formula_gives_no_guess_for_three_forms(field: str) -> None:
    found = list(parse_po(po(plural_entry(3), f"Plural-Forms: {field}"), name="a.po"))
    assert len(found) == 1
    assert isinstance(found[0], UnknownPlural)
    assert "a.po, line 6: 3 plural forms, but the header's Plural-Forms" in found[0].problem
    pairs = read(po(plural_entry(2), f"Plural-Forms: {field}"))
    assert pairs == [("one", "form 0"), ("many", "form 1")]


def test_an_empty_form_gives_no_pair_and_a_lone_form_is_for_all_numbers() -> None:
    entry = 'msgid "one"\nmsgid_plural "many"\nmsgstr[0] "a"\nmsgstr[1] ""\n'
    assert read(po(entry)) == [("one", "a")]
    assert read(po(plural_entry(1))) == [("one", "form 0"), ("many", "form 0")]


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("ISO-8859-1", "Café"),
        ("ISO-8859-2", "Příliš žluťoučký"),
        ("EUC-JP", "ドアを開ける"),
        ("Shift_JIS", "表示ソース"),  # bytes of backslashes within characters
        ("EUC-KR", "문을 열다"),
        ("GB18030", "打开软件"),
        ("Big5", "開啟功能"),
        ("KOI8-R", "Открыть"),
    ],
)
def test_text_is_decoded_by_the_charset_of_the_header(charset: str, text: str) -> None:
    assert read(po(f'msgid "x"\nmsgstr "{text}"\n', charset=charset)) == [("x", text)]
    header = f"Content-Type: text/plain; charset={charset}\n".encode()
    data = mo_bytes({b"": header, b"x": text.encode(charset)})
    assert [e.target for e in parse_mo(data, name="a.mo") if isinstance(e, CatalogueEntry)] == [
        text
    ]


def test_utf8_under_the_header_of_a_single_byte_charset_is_utf8() -> None:
    data = po('msgid "x"\nmsgstr "Café"\n').replace(b"UTF-8", b"ISO-8859-1")
    assert read(data) == [("x", "Café")]


@pytest.mark.parametrize(
    "charset", ["CHARSET", "undefined", "idna", "zip", "utf-16", "rot13", "x-y"]
)
def test_an_unknown_charset_is_utf8_or_an_error_that_names_the_place(charset: str) -> None:
    header = f"Content-Type: text/plain; charset={charset}\n".encode()
    good = mo_bytes({b"": header, b"x": "é".encode()})
    assert [e.target for e in parse_mo(good, name="a.mo") if isinstance(e, CatalogueEntry)] == ["é"]
    with pytest.raises(UserError, match=r"a\.mo: bytes e9 cannot be decoded as utf-8"):
        list(parse_mo(mo_bytes({b"": header, b"x": b"\xe9"}), name="a.mo"))
    body = po('msgid "x"\nmsgstr "?"\n').replace(b"?", b"\xe9")
    with pytest.raises(UserError, match=r"a\.po, line 6: not UTF-8"):
        list(parse_po(body.replace(b"UTF-8", charset.encode()), name="a.po"))


@pytest.mark.parametrize(
    ("written", "text", "charset"),
    [
        (r"Caf\303\251 offen", "Café offen", "UTF-8"),
        (r"Caf\xc3\xa9 offen", "Café offen", "UTF-8"),
        (r"Caf\351 \"x\"\t", 'Café "x"\t', "ISO-8859-1"),
        (r"\101\x42 \\303", "AB \\303", "UTF-8"),
        (r"\xa5\xc9\xa5\xa2", "ドア", "EUC-JP"),
        (r"\203A", "ア", "Shift_JIS"),
    ],
)
def test_octal_and_hexadecimal_escapes_are_bytes_of_the_charset(
    written: str, text: str, charset: str
) -> None:
    assert read(po(f'msgid "x"\nmsgstr "{written}"\n', charset=charset)) == [("x", text)]


def test_an_escape_may_be_divided_between_strings_but_not_joined_with_a_digit() -> None:
    assert read(po('msgid "x"\nmsgstr "\\303" "\\251"\n')) == [("x", "é")]
    assert read(po('msgid "x"\nmsgstr "\\10" "1"\n')) == [("x", "\b1")]
    with pytest.raises(UserError, match=r"a\.po, line 7: the bytes of an escape are not utf-8"):
        read(po('msgid "x"\nmsgstr "\\303"\n'))


def test_strings_and_keywords_may_share_a_line_and_domains_are_read() -> None:
    body = 'domain "other"\nmsgid "Open " "now" msgstr "Jetzt" " öffnen" # done\nmsgid"b"msgstr"B"'
    assert read(po(body)) == [("Open now", "Jetzt öffnen"), ("b", "B")]


def test_a_catalogue_whose_lines_end_in_cr_or_cr_lf_is_read() -> None:
    data = po('msgid "x"\nmsgstr "X"\n# c\nmsgid "y"\nmsgstr "Y"\n')
    for end in (b"\r", b"\r\n"):
        assert read(data.replace(b"\n", end)) == [("x", "X"), ("y", "Y")]


def test_contexts_and_plurals_of_kde_3_are_not_text() -> None:
    body = (
        'msgid "_: a menu\\n" "Open"\nmsgstr "Öffnen"\n\n'
        'msgid "_n: One file\\n" "%n files"\nmsgstr "Eine Datei\\n" "%n Dateien"\n\n'
        'msgid "_: NAME: x\\n_n: a\\nb"\nmsgstr "A\\nB"\n\n'
        'msgid "_n: only in name"\nmsgstr "nur"\n'
    )
    assert read(po(body)) == [
        ("Open", "Öffnen"),
        ("One file", "Eine Datei"),
        ("%n files", "%n Dateien"),
        ("a", "A"),
        ("b", "B"),
        ("_n: only in name", "nur"),
    ]


DEFAULTS = (
    '#. Default: "Open the page"\nmsgid "label_open"\nmsgstr "Seite öffnen"\n\n'
    '#. Default: When the user clicks.\nmsgid "Nothing here"\nmsgstr "Nichts hier"\n\n'
    '#. The Default: value is 5\nmsgid "Choose a value"\nmsgstr "Wähle"\n\n'
    '#. Default: "30"\nmsgid "Timeout"\nmsgstr "Zeit"\n'
)


def test_a_default_comment_is_the_text_of_a_key_only() -> None:
    sources = [source for source, _ in read(po(DEFAULTS))]
    assert sources == ["Open the page", "Nothing here", "Choose a value", "Timeout"]


def test_in_a_catalogue_of_plone_every_quoted_default_is_the_text() -> None:
    fields = ("Language-Code: de", "Preferred-Encodings: utf-8", "Domain: plone")
    sources = [source for source, _ in read(po(DEFAULTS, *fields))]
    assert sources == ["Open the page", "Nothing here", "Choose a value", "30"]


@pytest.mark.parametrize(
    ("body", "line", "found"),
    [
        ('msgid "x"\nhello', 6, "'hello'"),
        ('msgstr "x"\n', 5, "'msgstr'"),
        ('msgid "x"\nmsgid "y"\n', 6, "found msgid, expected msgstr"),
        ('msgid "x"\nmsgstr "a\n', 6, "found '\"a'"),
        ('msgid "x"\n', 6, "ends within a message"),
        ('msgid "x"\nmsgstr "a"\nmsgstr "b"\n', 7, "'msgstr'"),
        ('msgid "x"\nmsgstr[0] "a"\nmsgstr[0] "b"\n', 7, "'[0]'"),
        ('msgid "x"\nmsgstr[9999] "a"\n', 6, "'[9999]"),
    ],
)
def test_what_is_not_po_syntax_is_named_with_its_line(body: str, line: int, found: str) -> None:
    with pytest.raises(UserError) as error:
        read(po(body))
    assert f"a.po, line {line}: " in str(error.value)
    assert found in str(error.value)


def test_obsolete_and_fuzzy_entries_are_left_out_with_their_comments() -> None:
    body = (
        '#, fuzzy\n#~ msgid "old"\n#~ msgstr "alt"\n\nmsgid "a"\nmsgstr "A"\n\n'
        '#, c-format, fuzzy\n#| msgid "before"\nmsgid "b"\nmsgstr "B"\n\n'
        '#, c-format, fuzzy-not\nmsgid "c"\nmsgstr "C"\n'
    )
    assert read(po(body)) == [("a", "A"), ("c", "C")]


def test_a_line_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 100)
    assert read(po(f'msgid "x"\nmsgstr "{"a" * 80}"\n')) == [("x", "a" * 80)]
    with pytest.raises(UserError, match=r"a\.po, line 6: longer than 100 bytes, the limit.*break"):
        read(po(f'msgid "x"\nmsgstr "{"a" * 101}"\n'))


def _mo(count: int, sources: int, targets: int, spans: bytes, text: bytes) -> bytes:
    head = struct.pack("<7I", 0x950412DE, 0, count, sources, targets, 0, 0)
    return head + spans + text


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (_mo(2**32 - 1, 28, 28, b"", b""), "cut short: its tables end too early"),
        (_mo(1, 2**32 - 1, 28, b"", b""), "cut short: its tables end too early"),
        (_mo(1, 28, 36, struct.pack("<4I", 2**31, 2**31, 1, 44), b"x"), "a text ends beyond"),
        (_mo(3, 28, 52, struct.pack("<12I", *[40, 28] * 6), b"x" * 20), "its texts overlap"),
        (struct.pack("<7I", 0x950412DE, 7 << 16, 0, 28, 28, 0, 0), "revision 7"),
    ],
)
def test_a_compiled_catalogue_with_false_offsets_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(UserError, match=rf"a\.mo: .*{why}"):
        list(parse_mo(data, name="a.mo"))


def calls(body: str) -> int:
    """Return how many calls of functions, C functions included, reading takes."""
    count = 0

    def tick(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(tick)
    try:
        read(po(body))
    finally:
        sys.setprofile(None)
    return count


REPEATED = ['"abc\\303\\251"\n', 'msgid "a"\nmsgstr "b"\n', "# c\n", '"\\""\n', "#~ x\n"]


@pytest.mark.parametrize("line", REPEATED)
def test_the_work_of_reading_doubles_with_the_size(line: str) -> None:
    start = 'msgid "x"\nmsgstr ""\n'
    assert calls(start + line * 1000) <= 2.1 * calls(start + line * 500)
