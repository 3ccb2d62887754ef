import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from similarity import jaccard

from moesaic.core.errors import UserError
from moesaic.corpus import build_corpus as build_corpus_module
from moesaic.corpus import spill
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.cleaning import CleaningConfig
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.pair import Pair, RejectedPair, Text
from moesaic.corpus.sources.local_files import LocalFile, LocalFiles, PresplitFolder
from moesaic.corpus.sources.synthetic import SyntheticLanguages
from moesaic.corpus.sources.text_source import (
    CombinedSources,
    LanguageFilter,
    Progress,
    SourceFile,
    TextSource,
)
from moesaic.corpus.split import (
    SPLITS,
    DropNearDuplicates,
    HeldOutDomain,
    SplitConfig,
    split_key,
)
from moesaic.corpus.text_rules import SoftwareStrings

WORDS = [
    "alpha",
    "bravo",
    "charlie",
    "delta",
    "echo",
    "foxtrot",
    "golf",
    "hotel",
    "india",
    "juliet",
    "kilo",
    "lima",
    "mike",
]
HALVES = SplitConfig(test=0.3, valid=0.2)


def english(i: int) -> str:
    return f"{WORDS[i % 13]} {WORDS[i // 13 % 13]} {WORDS[i // 169 % 13]}"


class Given(TextSource):
    """Pairs written down in the test: (unit, source, target, language) in reading order."""

    rows: tuple[tuple[str, str, str, str], ...]
    texts: tuple[str, ...] = ()
    unfit: int = 0

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        del progress
        names = dict.fromkeys(row[0] for row in self.rows)
        return tuple(SourceFile(n, Path(n), version="1", licence=f"licence of {n}") for n in names)

    def read(
        self, source_file: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | Text | RejectedPair]:
        for name, source, target, code in self.rows:
            if name == source_file.name and wanted(code):
                yield Pair(source, target, "eng_Latn", code, name, source_file.licence)
        for text in self.texts:
            yield Text(text, "eng_Latn", source_file.name, source_file.licence)
        for _ in range(self.unfit):
            yield RejectedPair("eng_Latn", "deu_Latn", "disagree")


SOFTWARE = CleaningConfig(text_rules=SoftwareStrings())


def recipe(*rows: tuple[str, str, str, str], **more: object) -> CorpusRecipe:
    return CorpusRecipe(**({"name": "given", "source": Given(rows=rows), "split": HALVES} | more))


def german(count: int, unit: str = "a") -> list[tuple[str, str, str, str]]:
    return [(unit, english(i), f"deutsch {english(i)[::-1]}", "deu_Latn") for i in range(count)]


def french(count: int) -> list[tuple[str, str, str, str]]:
    return [("b", english(i), f"mot {english(i)[::-1]} ici", "fra_Latn") for i in range(count)]


def test_a_corpus_opened_from_disk_equals_the_built_one(tmp_path: Path) -> None:
    built = build_corpus(recipe(*german(200), *french(150)), out=tmp_path / "c")
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.manifest == built.manifest
    assert corpus.languages == ("deu_Latn", "eng_Latn", "fra_Latn")
    assert corpus.directions == (("eng_Latn", "deu_Latn"), ("eng_Latn", "fra_Latn"))
    kept = {p.source: p for s in SPLITS for p in corpus.iter_pairs("en", "de", split=s)}
    assert {(s, p.target) for s, p in kept.items()} == {(r[1], r[2]) for r in german(200)}
    assert kept[english(0)].licence == "licence of a"
    assert sum(corpus.count("en", "fr", split=s) for s in SPLITS) == 150
    corpus.verify()


def test_a_direction_can_be_read_in_reverse(tmp_path: Path) -> None:
    corpus = build_corpus(recipe(*german(50)), out=tmp_path / "c")
    there = [(p.source, p.target) for p in corpus.iter_pairs("en", "de")]
    back = [(p.target, p.source) for p in corpus.iter_pairs("de", "en")]
    assert there == back != []
    assert next(corpus.iter_pairs("de", "en")).source_language == "deu_Latn"


def test_a_source_is_in_the_same_split_in_every_language(tmp_path: Path) -> None:
    corpus = build_corpus(recipe(*german(300), *french(300)), out=tmp_path / "c")
    where = {
        code: {p.source: s for s in SPLITS for p in corpus.iter_pairs("en", code, split=s)}
        for code in ("de", "fr")
    }
    assert where["de"] == where["fr"]
    assert set(where["de"].values()) == set(SPLITS)


def test_no_held_out_row_shares_source_or_target_with_train(tmp_path: Path) -> None:
    rows = [("a", english(i), f"Ziel Nummer {'abcdefgh'[i % 8]}", "deu_Latn") for i in range(200)]
    rows += german(400)[200:]
    corpus = build_corpus(recipe(*rows), out=tmp_path / "c")
    train = list(corpus.iter_pairs("en", "de"))
    held = [p for s in SPLITS[1:] for p in corpus.iter_pairs("en", "de", split=s)]
    assert held
    for side in ("source", "target"):
        known = {split_key(getattr(p, side)) for p in train}
        assert not known & {split_key(getattr(p, side)) for p in held}
    assert corpus.manifest["directions"][0]["dropped"]["target_in_train"] > 20


def test_the_majority_decides_between_targets_whatever_the_order(tmp_path: Path) -> None:
    rows = [
        ("a", "Save", "Speichern", "deu_Latn"),
        ("b", "Save", "Sichern", "deu_Latn"),
        ("c", "Save", "Sichern", "deu_Latn"),
        ("a", "Open", "Öffnen", "deu_Latn"),
        ("b", "Open", "Aufmachen", "deu_Latn"),
    ]
    everything = SplitConfig(test=0, valid=0)
    corpus = build_corpus(recipe(*rows, split=everything), out=tmp_path / "c")
    found = {p.source: (p.target, p.origin) for p in corpus.iter_pairs("en", "de")}
    assert found == {"Save": ("Sichern", "b"), "Open": ("Öffnen", "a")}
    assert corpus.manifest["directions"][0]["dropped"] == {"duplicate": 1, "other_target": 2}


def test_every_row_read_is_kept_or_accounted_for(tmp_path: Path) -> None:
    bad = [("a", "Same", "same", "deu_Latn"), ("a", "Hi %s", "Hallo", "deu_Latn")]
    rows = recipe(*german(100), *german(30, "z"), *bad, clean=SOFTWARE)
    corpus = build_corpus(rows, out=tmp_path / "c")
    [direction] = corpus.manifest["directions"]
    kept = sum(part["pairs"] for part in direction["splits"].values())
    assert direction["read"] == 132 == kept + sum(direction["dropped"].values())
    assert direction["dropped"]["untranslated"] == direction["dropped"]["placeholders"] == 1


def test_buckets_do_not_change_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*german(300), *german(120, "z")]
    whole = build_corpus(recipe(*rows), out=tmp_path / "whole")
    monkeypatch.setattr(spill, "BUCKET_BYTES", 4000)
    parts = build_corpus(recipe(*rows), out=tmp_path / "parts")
    for split in SPLITS:
        assert set(whole.pairs(split)) == set(parts.pairs(split))


def test_tabs_and_newlines_inside_a_text_are_preserved(tmp_path: Path) -> None:
    rows = [("a b", "Back\\slash\\n here", "Rück wärts \\ hier\\n", "deu_Latn")]
    corpus = build_corpus(recipe(*rows, split=SplitConfig(test=0, valid=0)), out=tmp_path / "c")
    [pair] = corpus.iter_pairs("en", "de")
    assert (pair.source, pair.target, pair.origin) == (*rows[0][1:3], "a b")


def test_a_finished_corpus_of_the_same_recipe_is_not_built_again(tmp_path: Path) -> None:
    build_corpus(recipe(*german(20)), out=tmp_path / "c")
    before = (tmp_path / "c/corpus.json").stat().st_mtime_ns
    build_corpus(recipe(*german(20)), out=tmp_path / "c")
    assert (tmp_path / "c/corpus.json").stat().st_mtime_ns == before
    again = build_corpus(recipe(*german(30)), out=tmp_path / "c")
    assert again.manifest["pairs"] == 30


def test_a_corpus_of_an_earlier_version_is_not_built_again(tmp_path: Path) -> None:
    what = CorpusRecipe(
        name="old",
        source=SyntheticLanguages(phrases=60),
        split=SplitConfig(near_duplicates=DropNearDuplicates()),
    )
    built = build_corpus(what, out=tmp_path / "c")
    path = tmp_path / "c/corpus.json"
    text = path.read_text().replace('"SyntheticLanguages"', '"Synthetic"')
    path.write_text(
        text.replace('"near_duplicates"', '"near"').replace("DropNearDuplicates", "DropNear")
    )
    assert '"near"' in path.read_text()
    assert build_corpus(what, out=tmp_path / "c").fingerprint == built.fingerprint
    assert '"Synthetic"' in path.read_text()


def test_a_build_that_fails_leaves_the_old_corpus_and_no_parts(tmp_path: Path) -> None:
    old = build_corpus(recipe(*german(20)), out=tmp_path / "c")
    with pytest.raises(UserError, match=r"nothing to keep of 1 rows read \(1 untranslated\)"):
        build_corpus(recipe(("a", "Same", "same", "deu_Latn")), out=tmp_path / "c")
    assert Corpus.open(tmp_path / "c").fingerprint == old.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="contains files that are not a corpus"):
        build_corpus(recipe(*german(20)), out=tmp_path / "c")
    assert (tmp_path / "c/thesis.tex").read_text() == "mine"


def test_only_requested_languages_are_read_and_small_directions_are_dropped(tmp_path: Path) -> None:
    rows = [*german(60), *french(60), ("a", "Yes", "Sì", "ita_Latn")]
    few = build_corpus(recipe(*rows, min_pairs=10), out=tmp_path / "few")
    assert few.languages == ("deu_Latn", "eng_Latn", "fra_Latn")
    assert few.manifest["too_small"] == {"eng_Latn-ita_Latn": 1}
    one = build_corpus(recipe(*rows, languages=("fr",)), out=tmp_path / "one")
    assert one.directions == (("eng_Latn", "fra_Latn"),)


def test_texts_are_the_sides_of_train_rows_and_monolingual_text(tmp_path: Path) -> None:
    source = Given(rows=(*german(80), *french(80)), texts=("Only English here",))
    # the text is given twice, once by each unit
    corpus = build_corpus(
        recipe(source=source, split=SplitConfig(test=0.3, valid=0)), out=tmp_path / "c"
    )
    train = {p.target for p in corpus.iter_pairs("en", "de")}
    assert {t.text for t in corpus.iter_texts("de")} == train
    every = [t.text for s in SPLITS for t in corpus.iter_texts("en", split=s)]
    assert sorted(every) == sorted({english(i) for i in range(80)} | {"Only English here"})


@pytest.mark.parametrize("damage", ["cut", "gone", "format", "json"])
def test_a_damaged_corpus_is_named(tmp_path: Path, damage: str) -> None:
    build_corpus(recipe(*german(50)), out=tmp_path / "c")
    train = tmp_path / "c/eng_Latn-deu_Latn.train.tsv"
    about = tmp_path / "c/corpus.json"
    if damage == "cut":
        train.write_bytes(train.read_bytes()[:-7])
    elif damage == "gone":
        train.unlink()
    elif damage == "format":
        about.write_text(about.read_text().replace('"format": 1', '"format": 99'))
    else:
        about.write_text(about.read_text()[:-40])
    expected = {
        "cut": "bytes, expected",
        "gone": "missing",
        "format": "format 99",
        "json": "not a manifest of a corpus",
    }
    with pytest.raises(UserError, match=expected[damage]):
        Corpus.open(tmp_path / "c")


def test_a_full_disk_is_said_with_the_folder_and_leaves_the_old_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus(recipe(*german(50)), out=tmp_path / "c")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build_corpus_module.shutil, "copyfileobj", full)
    more = SyntheticLanguages(phrases=20)
    with pytest.raises(UserError, match=r"/c: cannot be written: no space left on device \(free"):
        build_corpus(recipe(source=more), out=tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert Corpus.open(tmp_path / "c").manifest["pairs"] == 50


def test_a_corpus_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus(recipe(*german(50)), out=tmp_path / "c")
    replace_path = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if ".part-" in path.name:
            raise OSError(errno.EIO, "I/O error")
        return replace_path(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="cannot be written"):
        build_corpus(recipe(*german(60)), out=tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert Corpus.open(tmp_path / "c").manifest["pairs"] == 50


def test_a_language_of_the_recipe_without_a_row_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    what = recipe(*german(50), languages=("de", "French"))
    build_corpus(what, out=tmp_path / "c", progress=lines.append)
    assert "languages: nothing is kept in French" in lines


def test_two_processes_that_build_one_corpus_do_not_disturb_each_other(tmp_path: Path) -> None:
    def build_meanwhile(line: str) -> None:
        if line.startswith("writing") and not (tmp_path / "c").exists():
            build_corpus(recipe(*german(50)), out=tmp_path / "c")

    corpus = build_corpus(recipe(*german(60)), out=tmp_path / "c", progress=build_meanwhile)
    assert corpus.manifest["pairs"] == 60
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_altered_file_of_the_same_size_is_found_by_its_hash(tmp_path: Path) -> None:
    corpus = build_corpus(recipe(*german(50)), out=tmp_path / "c")
    train = tmp_path / "c/eng_Latn-deu_Latn.train.tsv"
    train.write_text(train.read_text().replace("deutsch", "DEUTSCH"))
    with pytest.raises(UserError, match=r"deu_Latn\.train\.tsv: altered"):
        corpus.verify()


def test_what_a_corpus_does_not_have_is_named(tmp_path: Path) -> None:
    corpus = build_corpus(recipe(*german(20), *french(20)), out=tmp_path / "c")
    with pytest.raises(UserError, match=r"has no ita_Latn: it has deu_Latn, eng_Latn, fra_Latn"):
        next(corpus.iter_pairs("en", "it"))
    with pytest.raises(UserError, match="no pairs between deu_Latn and fra_Latn"):
        corpus.count("de", "fr")
    with pytest.raises(UserError, match='unknown split "dev"'):
        next(corpus.iter_pairs("en", "de", split="dev"))
    with pytest.raises(UserError, match="no corpus here"):
        Corpus.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r'unknown corpus "catalogs-small".*"catalogues-small"'):
        build_corpus("catalogs-small")


def test_a_users_own_files_become_a_corpus(tmp_path: Path) -> None:
    rows = [f"{r[1]}\t{r[2]}" for r in german(60)]
    (tmp_path / "mine.tsv").write_text("\n".join(rows))
    (tmp_path / "news.en").write_text("\n".join(english(i) for i in range(40)))
    (tmp_path / "news.fr").write_text("\n".join(r[2] for r in french(40)))
    (tmp_path / "more.txt").write_text("Noch ein Satz\n")
    files = (
        LocalFile(path=str(tmp_path / "mine.tsv"), source="en", target="de", licence="CC0-1.0"),
        LocalFile(path=str(tmp_path / "news"), source="en", target="fr"),
        LocalFile(path=str(tmp_path / "more.txt"), language="de"),
    )
    corpus = build_corpus(
        CorpusRecipe(name="mine", source=LocalFiles(files=files)), out=tmp_path / "c"
    )
    assert corpus.manifest["pairs"] == 100
    [origin] = [name for name in corpus.manifest["sources"] if name.endswith("/mine.tsv")]
    assert corpus.manifest["sources"][origin]["licence"] == "CC0-1.0"
    texts = [t.text for s in SPLITS for t in corpus.iter_texts("de", split=s)]
    assert "Noch ein Satz" in texts
    assert len(texts) == 61


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "mine.tsv"
    source = LocalFiles(files=(LocalFile(path=str(path), source="en", target="de"),))
    path.write_text("Save\tSichern\n")
    what = CorpusRecipe(name="mine", source=source)
    assert build_corpus(what, out=tmp_path / "c").manifest["pairs"] == 1
    path.write_text("Save\tSichern\nOpen all\tAlles öffnen\n")
    assert build_corpus(what, out=tmp_path / "c").manifest["pairs"] == 2


def test_a_presplit_folder_keeps_its_split_without_leakage(tmp_path: Path) -> None:
    rows = german(120)
    leak = rows[0]
    (tmp_path / "x").mkdir()
    for name, part in (("train", rows[:90]), ("valid", [*rows[90:], leak])):
        lines = [f"gimp\t{'X' * (r is leak and name == 'valid')}{r[1]}\t{r[2]}" for r in part]
        (tmp_path / f"x/de.{name}.tsv").write_text("\n".join(lines))
    corpus = build_corpus(
        CorpusRecipe(name="x", source=PresplitFolder(folder=str(tmp_path / "x"))),
        out=tmp_path / "c",
    )
    assert {p.source for p in corpus.iter_pairs("en", "de")} == {r[1] for r in rows[:90]}
    held = {p.source for s in SPLITS[1:] for p in corpus.iter_pairs("en", "de", split=s)}
    assert held == {r[1] for r in rows[90:]}
    assert corpus.manifest["sources"]["gimp"]["pairs"] == 120


def test_missing_files_and_folders_are_named_before_anything_is_read(tmp_path: Path) -> None:
    gone = LocalFile(path=str(tmp_path / "gone"), source="en", target="de")
    with pytest.raises(UserError, match=r"gone: no such file \(nor gone.<language> beside it"):
        build_corpus(CorpusRecipe(name="m", source=LocalFiles(files=(gone,))), out=tmp_path / "c")
    with pytest.raises(UserError, match="no such folder"):
        build_corpus(
            CorpusRecipe(name="m", source=PresplitFolder(folder=str(tmp_path / "no"))),
            out=tmp_path / "c",
        )


def test_pairs_rejected_by_their_source_are_counted(tmp_path: Path) -> None:
    source = Given(rows=tuple(german(20)), unfit=3)
    [direction] = build_corpus(recipe(source=source), out=tmp_path / "c").manifest["directions"]
    assert (direction["read"], direction["dropped"]["disagree"]) == (23, 3)


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    made = [SyntheticLanguages(phrases=90, seed=seed) for seed in range(3)]
    (tmp_path / "more.txt").write_text("Only this\n")
    own = LocalFiles(files=(LocalFile(path=str(tmp_path / "more.txt"), language="en"),))
    what = CorpusRecipe(
        name="many",
        source=CombinedSources(sources=(*made, own)),
        split=SplitConfig(near_duplicates=DropNearDuplicates()),
    )
    one = build_corpus(what, out=tmp_path / "one")
    two = build_corpus(what, out=tmp_path / "two", workers=2)
    assert one.manifest == two.manifest
    assert one.manifest["directions"][0]["dropped"]["near_train"] > 0


def test_no_held_out_source_is_nearly_a_train_source_of_any_language(tmp_path: Path) -> None:
    # German and French share no source, so what is near must be found across the languages
    rows = [*german(300)[::2], *(r for i, r in enumerate(french(300)) if i % 2)]
    keep = build_corpus(recipe(*rows), out=tmp_path / "keep")
    split = HALVES.replace(near_duplicates=DropNearDuplicates(threshold=0.8))
    drop = build_corpus(recipe(*rows, split=split), out=tmp_path / "drop")
    assert list(keep.pairs("train")) == list(drop.pairs("train"))
    train = {split_key(p.source) for p in keep.pairs("train")}
    held = [p for s in SPLITS[1:] for p in keep.pairs(s)]
    far = [p for p in held if max(jaccard(split_key(p.source), t) for t in train) < 0.8]
    assert [p for s in SPLITS[1:] for p in drop.pairs(s)] == far
    assert 0 < len(far) < len(held)
    dropped = sum(d["dropped"].get("near_train", 0) for d in drop.manifest["directions"])
    assert dropped == len(held) - len(far)


def test_a_domain_is_never_trained_on_and_is_a_split_of_its_own(tmp_path: Path) -> None:
    game = [
        ("game", f"{english(i)} dragon", f"{english(i)[::-1]} Drache", "deu_Latn")
        for i in range(60)
    ]
    shared = [("game", *r[1:]) for r in german(100)[:40]]
    split = HALVES.replace(domains=(HeldOutDomain(name="tales", packages=("game",)),))
    corpus = build_corpus(recipe(*german(100), *game, *shared, split=split), out=tmp_path / "c")
    assert corpus.splits == (*SPLITS, "tales")
    tales = list(corpus.iter_pairs("en", "de", split="tales"))
    assert {p.origin for p in tales} == {"game"}
    assert "game" not in {p.origin for s in SPLITS for p in corpus.pairs(s)}
    train = {split_key(p.source) for p in corpus.pairs("train")}
    assert not train & {split_key(p.source) for p in tales}
    assert {p.source for p in tales} >= {r[1] for r in game}
    [direction] = corpus.manifest["directions"]
    assert direction["dropped"]["source_in_train"] == sum(split_key(r[1]) in train for r in shared)
    kept = sum(part["pairs"] for part in direction["splits"].values())
    assert direction["read"] == 200 == kept + sum(direction["dropped"].values())
    corpus.verify()


def test_a_domains_votes_do_not_decide_what_trains(tmp_path: Path) -> None:
    rows = [("a", "Save", "Sichern", "deu_Latn")]
    rows += [(f"game-{i}", "Save", "Retten", "deu_Latn") for i in range(3)]
    split = SplitConfig(
        test=0, valid=0, domains=(HeldOutDomain(name="game", packages=("game-*",)),)
    )
    corpus = build_corpus(recipe(*rows, split=split), out=tmp_path / "c")
    assert [p.target for p in corpus.iter_pairs("en", "de")] == ["Sichern"]


def test_a_language_that_only_a_domain_has_is_left_out(tmp_path: Path) -> None:
    rows = [*german(40), *(("game", *r[1:]) for r in french(40))]
    split = HALVES.replace(domains=(HeldOutDomain(name="game", packages=("game",)),))
    corpus = build_corpus(recipe(*rows, split=split), out=tmp_path / "c")
    assert corpus.languages == ("deu_Latn", "eng_Latn")
    assert corpus.manifest["too_small"] == {"eng_Latn-fra_Latn": 0}
    assert sorted(p.name for p in (tmp_path / "c").glob("*fra_Latn*")) == []
