import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.core.errors import ConfigError, UserError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.dropped_rows import MAX_PER_REASON, read_dropped
from moesaic.corpus.sources.local_files import LocalFile, LocalFiles
from moesaic.corpus.sources.text_source import CombinedSources
from moesaic.corpus.split import HeldOutDomain, SplitConfig

ALL_TRAIN = SplitConfig(test=0, valid=0)
TMX = """<tmx version="1.4"><header srclang="en"/><body>
<tu><tuv xml:lang="en"><seg>Open the door</seg></tuv>
<tuv xml:lang="de"><seg>Mach die Tür auf</seg></tuv>
<tuv xml:lang="fr"><seg>Ouvre la porte</seg></tuv></tu></body></tmx>"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, *rows: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def file(path: str, **more: str) -> LocalFile:
    return LocalFile(path=path, **({"source": "en", "target": "de"} | more))


def build(*files: LocalFile, name: str = "c", split: SplitConfig = ALL_TRAIN) -> Corpus:
    recipe = CorpusRecipe(name=name, source=LocalFiles(files=files), split=split)
    return build_corpus(recipe, out=Path(name))


def rows_of(corpus: Corpus, source: str, target: str) -> list[tuple[str, str]]:
    return [(p.source, p.target) for p in corpus.iter_pairs(source, target)]


def test_another_language_of_a_file_does_not_change_the_first() -> None:
    write("first.tsv", "Open the door\tÖffne die Tür")
    write("multi.tmx", TMX)
    both = file("first.tsv"), file("multi.tmx")
    once = build(*both, name="once")
    twice = build(*both, file("multi.tmx", target="fr"), name="twice")
    assert rows_of(once, "en", "de") == rows_of(twice, "en", "de")
    read = {d["target"]: d["read"] for d in twice.manifest["directions"]}
    assert read == {"deu_Latn": 2, "fra_Latn": 1}


def test_two_languages_of_one_moses_prefix_are_read_once_each() -> None:
    for code, text in (("en", "Open it"), ("de", "Öffne es"), ("fr", "Ouvre-le")):
        write(f"news.{code}", text, f"{text} now")
    corpus = build(file("news"), file("news", target="fr"))
    assert [(d["read"], d["dropped"]) for d in corpus.manifest["directions"]] == [(2, {}), (2, {})]


def test_a_file_that_two_entries_find_votes_once() -> None:
    write("a.tsv", "Save\tSpeichern")
    write("b.tsv", "Save\tSichern")
    corpus = build(file("b.tsv", licence="MIT"), file("*.tsv"), file("./b.tsv"))
    assert corpus.manifest["directions"][0]["read"] == 2
    assert corpus.manifest["sources"]["b.tsv"]["licence"] == "MIT"


def test_a_file_of_two_sources_votes_once() -> None:
    write("a.tsv", "Save\tSpeichern")
    write("b.tsv", "Save\tSichern")
    parts = LocalFiles(files=(file("b.tsv"), file("a.tsv"))), LocalFiles(files=(file("./a.tsv"),))
    recipe = CorpusRecipe(name="c", source=CombinedSources(sources=parts), split=ALL_TRAIN)
    corpus = build_corpus(recipe, out=Path("c"))
    assert rows_of(corpus, "en", "de") == [("Save", "Sichern")]
    assert corpus.manifest["directions"][0]["read"] == 2


def test_an_exact_path_decides_about_a_licence_before_a_pattern() -> None:
    write("a.tsv", "Save\tSpeichern")
    write("b.tsv", "Open\tÖffnen")
    corpus = build(file("*.tsv", licence="MIT"), file("b.tsv", licence="GPL-3.0"))
    assert {o: s["licence"] for o, s in corpus.manifest["sources"].items()} == {
        "a.tsv": "MIT",
        "b.tsv": "GPL-3.0",
    }


def test_a_file_with_two_licences_is_refused() -> None:
    write("a.tsv", "Save\tSpeichern")
    with pytest.raises(UserError, match="listed twice, with two licences"):
        build(file("a.tsv", licence="MIT"), file("a.tsv", licence="GPL-3.0"))


def test_files_of_one_name_keep_their_own_licences() -> None:
    write("a/messages.tsv", "Save it\tSpeichern")
    write("b/messages.tsv", "Open it\tÖffnen")
    corpus = build(file("a/messages.tsv", licence="MIT"), file("b/messages.tsv", licence="GPL-3.0"))
    assert {p.source: (p.origin, p.licence) for p in corpus.iter_pairs("en", "de")} == {
        "Save it": ("a/messages.tsv", "MIT"),
        "Open it": ("b/messages.tsv", "GPL-3.0"),
    }


def test_an_origin_can_be_declared_and_has_one_licence() -> None:
    write("a.tsv", "Save it\tSpeichern")
    write("b.tsv", "Open it\tÖffnen")
    corpus = build(*(file(f"{name}.tsv", origin="ours", licence="MIT") for name in "ab"))
    assert corpus.manifest["sources"]["ours"]["pairs"] == 2
    with pytest.raises(UserError, match=r"origin ours: licence MIT by a\.tsv, GPL by b\.tsv"):
        build(
            file("a.tsv", origin="ours", licence="MIT"), file("b.tsv", origin="ours", licence="GPL")
        )


def domain(*packages: str) -> SplitConfig:
    return SplitConfig(test=0, valid=0, domains=(HeldOutDomain(name="tales", packages=packages),))


@pytest.mark.parametrize(
    ("pattern", "held_out"),
    [
        ("b/tales.tsv", ["Open it"]),
        ("tales.tsv", ["Save it", "Open it"]),
        ("b/*", ["Open it"]),
        ("tal*", ["Save it", "Open it"]),
    ],
)
def test_a_domain_is_a_full_origin_a_base_name_or_a_pattern(
    pattern: str, held_out: list[str]
) -> None:
    write("a/tales.tsv", "Save it\tSpeichern")
    write("b/tales.tsv", "Open it\tÖffnen")
    write("main.tsv", "Close it\tSchließen")
    files = file("a/tales.tsv"), file("b/tales.tsv"), file("main.tsv")
    corpus = build(*files, split=domain(pattern))
    assert [p.source for p in corpus.iter_pairs("en", "de", split="tales")] == held_out


@pytest.mark.parametrize("packages", [("tale.tsv",), ("tales.tsv", "tale.tsv"), ("nothing-*",)])
def test_a_domain_that_matches_nothing_is_refused_with_the_nearest_name(
    packages: tuple[str, ...],
) -> None:
    write("x/tales.tsv", "Save it\tSpeichern")
    write("main.tsv", "Close it\tSchließen")
    with pytest.raises(UserError, match=r'nothing is from "(tale.tsv|nothing-\*)".*x/tales.tsv'):
        build(file("x/tales.tsv"), file("main.tsv"), split=domain(*packages))
    assert not Path("c").exists()


def test_languages_are_taken_from_paths() -> None:
    for code, word in (("de", "Öffnen"), ("pt_BR", "Abrir"), ("fr_CA", "Ouvrir"), ("xx", "Xx")):
        write(
            f"locale/{code}/LC_MESSAGES/django.po",
            'msgid "Open"',
            f'msgstr "{word}"',
            "",
            'msgid "Close"',
            'msgstr ""',
        )
    write("news/en-fr.tsv", "Close\tFermer")
    files = (
        LocalFile(path="locale/{lang}/LC_MESSAGES/*.po", source="en"),
        LocalFile(path="news/{source}-{target}.tsv"),
    )
    corpus = build(*files)
    assert rows_of(corpus, "en", "de") == [("Open", "Öffnen")]
    assert rows_of(corpus, "en", "pt-BR") == [("Open", "Abrir")]
    assert rows_of(corpus, "en", "fr") == [("Close", "Fermer")]
    assert {Path(name).parts[1] for name in corpus.manifest["missing"]} == {"fr_CA", "xx"}


def test_texts_take_their_language_from_the_path() -> None:
    write("de.txt", "Die Tür ist offen")
    write("fr.txt", "La porte est ouverte")
    corpus = build(LocalFile(path="{lang}.txt"))
    assert corpus.languages == ("deu_Latn", "fra_Latn")


def test_a_folder_is_read_with_every_file_of_pairs_below_it() -> None:
    write("all/a.tsv", "Save\tSpeichern")
    write("all/in/b.tsv", "Open\tÖffnen")
    write("all/in/readme.md", "not pairs")
    write("all/.hidden/c.tsv", "Close\tSchließen")
    os.symlink("..", "all/in/loop")
    assert rows_of(build(file("all")), "en", "de") == [("Save", "Speichern"), ("Open", "Öffnen")]


def test_a_folder_of_texts_is_read_without_its_catalogues_and_pictures() -> None:
    write("texts/a.txt", "Ein Text steht hier")
    write("texts/b.po", 'msgid "Open"', 'msgstr "Öffnen"')
    Path("texts/c.png").write_bytes(b"\x89PNG\r\n")
    corpus = build(LocalFile(path="texts", language="de"))
    assert [text.text for text in corpus.iter_texts("de")] == ["Ein Text steht hier"]
    with pytest.raises(UserError, match=r"b\.po: a PO catalogue, expected text in one language"):
        build(LocalFile(path="texts/*.po", language="de"))


def test_one_empty_file_of_many_is_left_out_and_said() -> None:
    write("a.po", 'msgid "Open"', 'msgstr ""')
    write("b.tsv")
    write("c.tsv", "Save\tSpeichern")
    reported: list[str] = []
    files = LocalFiles(files=(file("a.po"), file("b.tsv"), file("c.tsv")))
    recipe = CorpusRecipe(name="c", source=files, split=ALL_TRAIN)
    corpus = build_corpus(recipe, out=Path("c"), progress=reported.append)
    assert rows_of(corpus, "en", "de") == [("Save", "Speichern")]
    assert set(corpus.manifest["empty"]) == {"a.po", "b.tsv"}
    assert sum("left out" in line for line in reported) == 2


def test_files_that_are_all_empty_are_an_error_that_names_one() -> None:
    write("a.tsv")
    with pytest.raises(UserError, match=r"a\.tsv: empty"):
        build(file("a.tsv"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (file("none/*.tsv"), "no file matches this pattern"),
        (file("empty"), "no file of .tsv, .jsonl, .po, .mo, .tmx below this folder"),
        (file("a.tvs"), 'no such file .* did you mean "a.tsv"'),
        (file("{langs}.tsv"), r"{langs} is no place for a language.*\"{lang}\""),
        (file("{source}-{target}.tsv"), "source is given by the path and by a key"),
        (LocalFile(path="{lang}-{source}-{target}.tsv"), "one is too many"),
        (file("a.tsv", target="en"), "both languages are the same"),
    ],
)
def test_an_entry_without_files_is_an_error_that_says_why(entry: LocalFile, message: str) -> None:
    write("a.tsv", "Save\tSpeichern")
    write("en-de.tsv", "Save\tSpeichern")
    write("fr-en-de.tsv", "Save\tSpeichern")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        build(entry)


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("nowhere"), lambda p: os.mkfifo(p)])
def test_a_path_that_is_no_regular_file_is_refused_unread(make: Callable[[Path], None]) -> None:
    make(Path("x.tsv"))
    with pytest.raises(UserError, match="not a regular file"):
        build(file("x.tsv"))


def test_a_name_that_is_not_utf8_or_not_one_line_can_be_an_origin() -> None:
    write("a\nb.tsv", "Save it\tSpeichern")
    Path(os.fsdecode(b"c\xff.tsv")).write_text("Open it\tÖffnen\n", encoding="utf-8")
    corpus = build(file("*.tsv"))
    assert set(corpus.manifest["sources"]) == {"a\\x0ab.tsv", "c\ufffd.tsv"}
    assert {p.origin for p in corpus.iter_pairs("en", "de")} == set(corpus.manifest["sources"])
    assert all(source["pairs"] == 1 for source in corpus.manifest["sources"].values())


def test_held_out_pairs_count_for_an_origin_with_a_backslash() -> None:
    write("a.tsv", *(f"Open the {'x' * n}\tÖffne {'y' * n}" for n in range(30)))
    corpus = build(file("a.tsv", origin="a\\b"), split=SplitConfig(test=0.5))
    assert corpus.count("en", "de", split="test")
    assert corpus.manifest["sources"]["a\\b"]["pairs"] == corpus.manifest["pairs"]


def test_an_entry_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="no file is listed"):
        LocalFiles(files=())
    with pytest.raises(ConfigError, match="path"):
        file("")


def test_dropped_rows_can_be_looked_at_and_are_few() -> None:
    words = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefghijk"]
    write("a.tsv", *(f"Word {w}\tword {w}" for w in words), "Save\tSpeichern", "Save\tSichern")
    write("b.tsv", "Save\tSichern", "x" * 2000 + "\tb")
    corpus = build(file("a.tsv"), file("b.tsv"))
    found = list(read_dropped(corpus.path))
    numbers = {r: sum(row.reason == r for row in found) for r in {row.reason for row in found}}
    assert numbers == {
        "untranslated": MAX_PER_REASON,
        "other_target": 1,
        "duplicate": 1,
        "too_long": 1,
    }
    [other] = [row for row in found if row.reason == "other_target"]
    assert (other.source, other.target, other.kept) == ("Save", "Speichern", "Sichern")
    assert max(len(row.source) for row in found) < 400


def test_text_that_is_a_side_of_a_held_out_pair_is_not_trained_on() -> None:
    words = [f"{a}{b}" for a in "abcdefghkl" for b in "mnoprstuvw"]
    write("a.tsv", *(f"Open the {w}\tÖffne die {w[::-1]}" for w in words))
    write("de.txt", *(f"öffne die {w[::-1]}!" for w in words), "Ganz anderes")
    corpus = build(
        file("a.tsv"), LocalFile(path="de.txt", language="de"), split=SplitConfig(test=0.5)
    )
    targets = {p.target.casefold() for p in corpus.iter_pairs("en", "de", split="test")}
    trained = {t.text.casefold().rstrip("!") for t in corpus.iter_texts("de")}
    assert targets
    assert not targets & trained
    counts = corpus.manifest["texts"]["deu_Latn"]
    assert counts["dropped"]["held_out_pair"] > 0
    assert counts["read"] == sum(counts["splits"].values()) + sum(counts["dropped"].values())


def test_equal_sources_are_not_on_two_sides_of_the_split_when_english_is_the_target() -> None:
    rows = [
        (f"Tür Nummer {i % 9}", f"door {c} number {d}")
        for i, (c, d) in enumerate((c, d) for c in "abcdefgh" for d in "qrstuvwxyz")
    ]
    write("a.tsv", *(f"{g}{'!' * (i // 9)}\t{e}" for i, (g, e) in enumerate(rows)))
    corpus = build(file("a.tsv", source="de", target="en"), split=SplitConfig(test=0.4, valid=0.1))
    assert corpus.manifest["directions"][0]["dropped"]["source_in_train"] > 0
    assert not list(corpus.iter_pairs("de", "en", split="test"))
