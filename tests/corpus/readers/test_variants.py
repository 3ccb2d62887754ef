"""Files with several languages: those asked for are read, exact tags first."""

import json
from pathlib import Path

import pytest

from moesaic.core.errors import UserError
from moesaic.corpus.readers import limits
from moesaic.corpus.readers.formats import read_pairs

ROOT = '<tmx version="1.4"{}><header srclang="en"/><body>{}</body></tmx>'


def tmx(*units: str, root: str = "") -> str:
    return ROOT.format(root, "".join(f"<tu>{unit}</tu>" for unit in units))


def unit(**texts: str) -> str:
    tags = {tag.replace("_", "-"): text for tag, text in texts.items()}
    return "".join(f'<tuv xml:lang="{t}"><seg>{s}</seg></tuv>' for t, s in tags.items())


def read(path: Path, content: str, **sides: str) -> list[tuple[str, str]]:
    path.write_text(content, encoding="utf-8")
    asked = {"source": "en", "target": "de"} | sides
    return [(p.source, p.target) for p in read_pairs(path, **asked)]


def translation(**texts: object) -> str:
    return json.dumps({"translation": {k.replace("_", "-"): v for k, v in texts.items()}}) + "\n"


@pytest.mark.parametrize(
    "other",
    [
        '<tuv xml:lang="gsw"><seg>x</seg></tuv>',
        '<tuv xml:lang="x-notes"><seg>x</seg></tuv>',
        '<tuv xml:lang="qqq-1234567890"><seg>x</seg></tuv>',
        "<tuv><seg>x</seg></tuv>",
        '<tuv xml:lang=""><seg>x</seg></tuv>',
        '<tuv xml:lang="fr"><seg>x</seg></tuv>',
        '<tuv xml:lang="fr"/>',
        '<note xml:lang="gsw">x</note><prop type="score">0.7</prop>',
    ],
)
def test_a_language_nobody_asked_for_does_not_stop_a_memory(tmp_path: Path, other: str) -> None:
    whole = unit(en="Open", de="Öffne")
    path = tmp_path / "a.tmx"
    for content in (other + whole, whole + other):
        assert read(path, tmx(content, other)) == [("Open", "Öffne")]


@pytest.mark.parametrize(
    "other", [{"gsw": "x"}, {"score": 0.7}, {"fr": None}, {"id": 17}, {"": ""}]
)
def test_a_key_nobody_asked_for_does_not_stop_jsonl(
    tmp_path: Path, other: dict[str, object]
) -> None:
    path = tmp_path / "a.jsonl"
    content = translation(**{"en": "Open", "de": "Öffne"} | other)
    content += translation(**other | {"de": "Zu", "en": "Shut"})
    assert read(path, content) == [("Open", "Öffne"), ("Shut", "Zu")]


def test_the_direction_of_jsonl_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = translation(en="one", de="eins") + translation(de="zwei", en="two")
    expected = [("one", "eins"), ("two", "zwei")]
    assert read(path, content, source="", target="") == expected
    assert read(path, content, source="en", target="") == expected
    assert read(path, content, source="", target="de") == expected
    assert read(path, content, source="de", target="") == [(b, a) for a, b in expected]


def test_which_of_three_languages_must_be_given(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = translation(en="one", de="eins", fr="un")
    assert read(path, content, source="fr") == [("un", "eins")]
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: its languages are en, de, fr: give so"):
        read(path, content, target="")


def test_a_line_without_the_languages_asked_for_is_left_out_unless_all_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = translation(en="one", fr="un") + translation(en="two", de="zwei")
    assert read(path, content) == [("two", "zwei")]
    with pytest.raises(UserError, match=r"line 1: its languages are en, fr, expected eng_Latn and"):
        read(path, content, target="ja")


def test_a_line_in_an_unknown_language_is_left_out_where_both_are_given(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "gsw"}, {"src": "c", "tgt": "d"}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    assert read(path, content) == [("c", "d")]
    with pytest.raises(UserError, match='line 1: unknown language "gsw"'):
        read(path, content, target="")


REGIONS = {"de_AT": "Erdäpfel", "de_DE": "Kartoffeln", "de_CH": "Härdöpfel"}
CHINESE = {"zh_HK": "軟件", "zh_TW": "軟體", "zh_CN": "软件"}


@pytest.mark.parametrize(
    ("texts", "asked", "expected"),
    [
        (REGIONS, "de-DE", "Kartoffeln"),
        (REGIONS, "de-AT", "Erdäpfel"),
        (REGIONS, "de_CH", "Härdöpfel"),
        (REGIONS, "DE-at", "Erdäpfel"),
        (REGIONS, "de", "Kartoffeln"),
        (REGIONS, "de-LU", "Kartoffeln"),
        (REGIONS | {"de": "Grumbeere"}, "deu_Latn", "Grumbeere"),
        (REGIONS | {"de": "Grumbeere"}, "de", "Grumbeere"),
        (CHINESE, "zh-CN", "软件"),
        (CHINESE, "zh", "软件"),
        (CHINESE, "zh-HK", "軟件"),
        (CHINESE, "zh-TW", "軟體"),
        (CHINESE, "zho_Hant", "軟體"),
        ({"pt_BR": "trem", "pt": "comboio"}, "pt", "comboio"),
        ({"pt_BR": "trem", "pt": "comboio"}, "pt-BR", "trem"),
        ({"de_CH_1996": "Strasse"}, "de", "Strasse"),
    ],
)
def test_an_exact_tag_wins_over_a_reduced_one(
    tmp_path: Path, texts: dict[str, str], asked: str, expected: str
) -> None:
    for sides in (texts, dict(reversed(texts.items()))):
        assert read(tmp_path / "a.tmx", tmx(unit(en="x", **sides)), target=asked) == [
            ("x", expected)
        ]
        assert read(tmp_path / "a.jsonl", translation(en="x", **sides), target=asked) == [
            ("x", expected)
        ]
    for tag, text in texts.items():
        (tmp_path / f"news[1].{tag}").write_text(f"{text}\n")
    (tmp_path / "news[1].en").write_text("x\n")
    if "CH" not in asked and "1996" not in str(texts) and "LU" not in asked:
        found = [p.target for p in read_pairs(tmp_path / "news[1]", source="en", target=asked)]
        assert found == [expected]


def test_a_simplified_text_is_not_read_as_traditional(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no unit with both eng_Latn and zho_Hant"):
        read(tmp_path / "a.tmx", tmx(unit(en="x", zh_CN="软件")), target="zh-HK")


def test_several_texts_under_one_tag_are_several_pairs_and_not_all_combinations(
    tmp_path: Path,
) -> None:
    german = "".join(unit(de=f"d{i}") for i in range(300))
    english = "".join(unit(en=f"e{i}") for i in range(300))
    found = read(tmp_path / "a.tmx", tmx(english + german))
    assert len(found) == 599
    assert found[:2] == [("e0", "d0"), ("e0", "d1")]
    assert found[-1] == ("e299", "d0")


def test_a_default_namespace_old_attributes_and_capitals_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tmx"
    assert read(path, tmx(unit(en="a", de="b"), root=' xmlns="http://x/tmx14"')) == [("a", "b")]
    old = '<tuv lang="EN-US"><seg>a</seg></tuv><tuv lang="DE_de"><seg>b</seg></tuv>'
    assert read(path, tmx(old)) == [("a", "b")]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('one<ph x="1">&lt;br/&gt;</ph>two', "one two"),
        ('one<ph x="1"/>two', "one two"),
        ("one <ph/> two", "one  two"),
        ("one<ph>\\n</ph>two", "one two"),
        ("Stop<ph/>!", "Stop!"),
        ("(<ph/>one)", "(one)"),
        ("<ph/>one<ph/>", "one"),
        ("<bpt i='1'>&lt;b&gt;</bpt>H<ept i='1'>&lt;/b&gt;</ept>ello", "Hello"),
        ("one<it pos='begin'>&lt;p&gt;</it>two", "one two"),
        ("one<ph>&lt;b&gt;</ph>two", "onetwo"),
        ("Hi <ph>{0}</ph>, <ph>%s</ph>", "Hi {0}, %s"),
        ("a <hi>b <ph>x<sub>note</sub></ph>c</hi> d", "a b c d"),
        ("हिन्दी<ph/>भाषा", "हिन्दी भाषा"),
        ("a&amp;b &lt;c&gt;", "a&b <c>"),
    ],
)
def test_words_beside_an_inline_code_stay_words(tmp_path: Path, written: str, text: str) -> None:
    assert read(tmp_path / "a.tmx", tmx(unit(en=written, de="b"))) == [(text, "b")]


@pytest.mark.parametrize("depth", [2_000, 100_000])
def test_a_memory_nested_too_deeply_is_refused(tmp_path: Path, depth: int) -> None:
    nested = "<hi>" * depth + "a" + "</hi>" * depth
    with pytest.raises(UserError, match=r"a\.tmx, after line 0: elements nested deeper than 100"):
        read(tmp_path / "a.tmx", tmx(unit(en=nested, de="b")))
    fine = "<hi>" * 50 + "a" + "</hi>" * 50
    assert read(tmp_path / "a.tmx", tmx(unit(en=fine, de="b"))) == [("a", "b")]


@pytest.mark.parametrize("where", ["header", "unit", "comment", "attribute", "text", "end"])
def test_a_memory_with_endless_parts_is_refused(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_UNIT_BYTES", 1 << 18)
    filling = '<prop type="x"/>\n' * 100_000
    good = unit(en="a", de="b")
    content = {
        "header": tmx(good).replace("<body>", f"<x>{filling}</x><body>"),
        "unit": tmx(good + filling),
        "comment": tmx(good).replace("<body>", f"<!--{'x' * 2_000_000}--><body>"),
        "attribute": tmx(good).replace('srclang="en"', f'srclang="{"x" * 2_000_000}"'),
        "text": tmx(unit(en="a" * 2_000_000, de="b")),
        "end": tmx(good).replace("</body>", f"</body>{filling}"),
    }[where]
    with pytest.raises(
        UserError, match=r"a\.tmx, near line \d+: more than 256 KiB without the end"
    ):
        read(tmp_path / "a.tmx", content)
    assert len(read(tmp_path / "a.tmx", tmx(*[good] * 4_000))) == 4_000  # the file may be larger


def test_nothing_outside_of_a_memory_is_read_and_no_entity_expanded(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    entity = f'<!DOCTYPE tmx [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    assert read(tmp_path / "a.tmx", entity + tmx(unit(en="a&x;", de="b"))) == [("a", "b")]
    doctype = '<?xml version="1.0"?><!DOCTYPE tmx SYSTEM "tmx14.dtd">'
    assert read(tmp_path / "a.tmx", doctype + tmx(unit(en="a", de="b"))) == [("a", "b")]


@pytest.mark.parametrize("entity", ["&nbsp;", "&product;"])
def test_an_entity_of_a_dtd_elsewhere_is_refused_and_not_left_out(
    tmp_path: Path, entity: str
) -> None:
    doctype = '<?xml version="1.0"?>\n<!DOCTYPE tmx SYSTEM "tmx14.dtd">\n'
    with pytest.raises(UserError, match=f"line 3: Entity '{entity[1:-1]}' not defined in this"):
        read(tmp_path / "a.tmx", doctype + tmx(unit(en=f"Open{entity}it", de="b")))
    own = doctype.replace('SYSTEM "tmx14.dtd"', f'[<!ENTITY {entity[1:-1]} " ">]')
    assert read(tmp_path / "b.tmx", own + tmx(unit(en=f"a{entity}b", de="c"))) == [("a b", "c")]


@pytest.mark.parametrize("form", ["{}_lang", "{}_language", "{}Lang", "{}Language"])
@pytest.mark.parametrize("sides", [("src", "tgt"), ("source", "target")])
def test_the_languages_of_a_line_win_over_those_of_the_file(
    tmp_path: Path, sides: tuple[str, str], form: str
) -> None:
    keys = [form.format(side) for side in sides]
    row = {sides[0]: "Auf", sides[1]: "Open", keys[0]: "de", keys[1]: "en"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    [pair] = read_pairs(path, source="en", target="de")
    assert (pair.source_language, pair.target_language) == ("deu_Latn", "eng_Latn")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"src": ' + "[" * 50_000 + "]" * 50_000 + ', "tgt": "x"}', "nested deeper than 100"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, "nested deeper than 100"),
        ("[" * 300_000, "nested deeper than 100"),
        ('{"src": "a", "src": "b", "tgt": "x"}', 'the key "src" is there twice'),
        ('{"src": ' + "9" * 10_000 + ', "tgt": "x"}', "not valid JSON"),
        ('{"src": {"a": "' + "b" * 10_000 + '"}, "tgt": "x"}', "found dict of 1, expected a text"),
        ('{"translation": ["' + "b" * 10_000 + '"]}', "found list of 1"),
        ("{" + ",".join(f'"{i}": 1' for i in range(5_000)) + "}", "found keys 0, 1, 2"),
    ],
)
def test_a_strange_json_line_is_refused_in_a_short_sentence(
    tmp_path: Path, line: str, why: str
) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: ") as error:
        read(tmp_path / "a.jsonl", line)
    assert why in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("end", ["", "\\"])
def test_a_text_that_does_not_end_takes_linear_time(tmp_path: Path, end: str) -> None:
    line = '{"src": "' + '[\\"' * 300_000 + end  # quadratic: minutes
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: not valid JSON"):
        read(tmp_path / "a.jsonl", line)


def test_brackets_within_texts_are_no_nesting(tmp_path: Path) -> None:
    text = '[{"' * 200
    line = json.dumps({"src": text, "tgt": "x"})
    assert read(tmp_path / "a.jsonl", line) == [(text, "x")]


@pytest.mark.parametrize("key", ["src", "tgt", "text", "translation"])
def test_a_lone_surrogate_becomes_the_replacement_character(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.jsonl"
    if key == "translation":
        line = json.dumps({key: {"en": "a\ud83d", "de": "b \ude00"}})
    else:
        line = json.dumps({"src": "a\ud83d", "tgt": "b \ude00"})
    assert read(path, line) == [("a\ufffd", "b \ufffd")]
    pair = json.dumps({"src": "\ud83d\ude00", "tgt": "x"})
    assert read(path, pair) == [("😀", "x")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            '"She said ""no"""\t"Sie ""nein"""\na\tb\n',
            [('She said "no"', 'Sie "nein"'), ("a", "b")],
        ),
        ('"one\ntwo"\t"eins\nzwei"\na\tb\n', [("one\ntwo", "eins\nzwei"), ("a", "b")]),
        ('"a\tb"\tc\n', [("a\tb", "c")]),
        ('"a"\t"b"\n"c"\t"d"\n', [("a", "b"), ("c", "d")]),
        ('a\tb\n"x ""y"""\tz\n', [("a", "b"), ('x "y"', "z")]),
        # quotes that are text
        ('"a"\t"b"\nc\td\n', [('"a"', '"b"'), ("c", "d")]),
        ('"a"\t"b"\n', [('"a"', '"b"')]),
        ('"a ""b"""\tc\n"d\te\n', [('"a ""b"""', "c"), ('"d', "e")]),
        ('a "b" c\td ""e""\n', [('a "b" c', 'd ""e""')]),
        ('"a" b\tc "d"\n', [('"a" b', 'c "d"')]),
        ('a"\tb"\nc\t"d\n', [('a"', 'b"'), ("c", '"d')]),
        ('""\ta\n', [('""', "a")]),
    ],
)
def test_only_a_file_that_is_csv_as_a_whole_is_read_without_its_quotes(
    tmp_path: Path, content: str, expected: list[tuple[str, str]]
) -> None:
    assert read(tmp_path / "a.tsv", content) == expected
