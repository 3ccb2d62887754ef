import subprocess
from pathlib import Path

import pytest
from catalogue_files import deb_bytes, mo_bytes, write_wheel

from moesaic.core.errors import UserError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe, named_corpus
from moesaic.corpus.sources import apt, debian_descriptions
from moesaic.corpus.sources.debian_descriptions import DebianDescriptions
from moesaic.corpus.sources.gettext_catalogues import (
    DebianCatalogues,
    PyPICatalogues,
    desktop_packages,
)
from moesaic.corpus.sources.package_archives import PyPIPackage
from moesaic.corpus.sources.text_source import CombinedSources, ignore_progress
from moesaic.corpus.split import SplitConfig

ALL_TRAIN = SplitConfig(test=0, valid=0)
FILES = {
    "./usr/share/locale/de/LC_MESSAGES/demo.mo": mo_bytes({b"Save file": b"Datei sichern"}),
    "./usr/share/locale/en_GB/LC_MESSAGES/demo.mo": mo_bytes({b"Color": b"Colour"}),
    "./usr/share/doc/demo-data/copyright": b"Files: *\nLicense: GPL-2+\n\nLicense: MIT\n text\n",
}
ENGLISH = """Package: demo
Description-md5: aaa
Description-en: drawing program
 It draws lines and
 circles on paper:
  * many colours
  * many brushes
 .
 It is quick.

Package: old
Description-md5: bbb
Description-en: an old thing
 Changed since it was translated.

"""
GERMAN = """Package: demo
Description-md5: aaa
Description-de: Zeichenprogramm
 Es zeichnet Linien
 und Kreise auf Papier:
  * viele Farben
  * viele Pinsel
 .
 Es ist schnell.

Package: old
Description-md5: bbb
Description-de: ein altes Ding
"""
JAPANESE = """Package: demo
Description-md5: aaa
Description-ja: 描画プログラム
 紙の上に線や
 円を描きます:
  * 多くの色
  * 多くの筆
 .
 速いです。
"""


class Apt:
    """Stands in for apt: knows three packages, downloads them, updates descriptions."""

    def __init__(self, problem: str = "") -> None:
        self.problem, self.gone, self.commands = problem, "nothing", []

    def __call__(
        self, command: list[str], *, cwd: Path, **_: object
    ) -> subprocess.CompletedProcess[str]:
        self.commands.append(command[1])
        if self.problem:
            return subprocess.CompletedProcess(command, 100, "", f"W: x\nE: {self.problem}\n")
        if command[1] == "download":
            if self.gone in command[3:]:
                why = f"E: Failed to fetch {self.gone}_1.deb  404  Not Found"
                return subprocess.CompletedProcess(command, 100, "", why)
            for name in command[3:]:
                (cwd / f"{name}_1%3a2.0_all.deb").write_bytes(deb_bytes(FILES))
        if command[1] == "update":
            for code, text in (("en", ENGLISH), ("de", GERMAN), ("ja", JAPANESE)):
                path = Path(cwd) / f"lists/mirror_dists_stable_main_i18n_Translation-{code}"
                path.write_text(text, encoding="utf-8")
        listing = "demo-data\ndemo\nother-data\n" if command[1] == "pkgnames" else ""
        if command[1] == "show":
            listing = "\n\n".join(f"Package: {n}\nVersion: 1:2.0" for n in command[3:])
        return subprocess.CompletedProcess(command, 0, listing, "")


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    stand_in = Apt()
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    monkeypatch.setattr(apt.subprocess, "run", stand_in)
    monkeypatch.setattr(apt.shutil, "which", lambda _: "/usr/bin/apt-get")
    return stand_in


@pytest.mark.parametrize("suffix", [".xz", ".zst", ""])
def test_the_catalogues_of_a_deb_are_read(debian: Apt, tmp_path: Path, suffix: str) -> None:
    (tmp_path / "packages/deb").mkdir(parents=True)
    (tmp_path / "packages/deb/demo-data_1%3a2.0_all.deb").write_bytes(deb_bytes(FILES, suffix))
    source = DebianCatalogues(packages=("demo-*",))
    [unit] = source.fetch(progress=ignore_progress)
    assert (unit.name, unit.version) == ("demo-data", "1:2.0")
    [pair] = source.read(unit, wanted=lambda _: True)
    assert (pair.source, pair.target, pair.target_language) == (
        "Save file",
        "Datei sichern",
        "deu_Latn",
    )
    assert (pair.origin, pair.licence) == ("demo-data", "GPL-2+, MIT")
    assert "download" not in debian.commands


def test_packages_are_downloaded_once(debian: Apt) -> None:
    source = DebianCatalogues(packages=("demo-*", "other-data", "unknown"))
    units = source.fetch(progress=ignore_progress)
    assert [u.name for u in units if not u.missing_reason] == ["demo-data", "other-data"]
    source.fetch(progress=ignore_progress)
    assert debian.commands.count("download") == 1


def test_an_unavailable_package_is_left_out_reported_and_counted(
    debian: Apt, tmp_path: Path
) -> None:
    debian.gone, reported = "demo-data", []
    source = DebianCatalogues(packages=("demo-data", "other-data", "unreported-of"))
    what = CorpusRecipe(name="d", source=source, split=ALL_TRAIN)
    corpus = build_corpus(what, out=tmp_path / "c", progress=reported.append)
    assert corpus.count("en", "de") == 1
    assert set(corpus.manifest["missing"]) == {"demo-data", "unreported-of"}
    assert "404" in corpus.manifest["missing"]["demo-data"]
    assert corpus.manifest["missing"]["unreported-of"] == "apt does not list it"
    assert [r["name"] for r in corpus.manifest["read"]] == ["other-data"]
    assert any(
        "left out" in t and "2 Debian packages (demo-data, unreported-of)" in t for t in reported
    )


def test_without_any_available_package_the_error_names_the_way_out(debian: Apt) -> None:
    debian.gone = "demo-data"
    with pytest.raises(UserError, match=r"none of 1 packages.*404.*run `apt-get update`"):
        DebianCatalogues(packages=("demo-data",)).fetch(progress=ignore_progress)


def test_without_apt_cached_packages_are_used_or_the_error_names_the_way_out(
    debian: Apt, monkeypatch: pytest.MonkeyPatch
) -> None:
    DebianCatalogues(packages=("demo-data",)).fetch(progress=ignore_progress)
    monkeypatch.setattr(apt.shutil, "which", lambda _: None)
    assert [
        u.name for u in DebianCatalogues(packages=("demo-*",)).fetch(progress=ignore_progress)
    ] == ["demo-data"]
    with pytest.raises(UserError, match=r"apt-get was not found.*container.*packages/deb"):
        DebianCatalogues(packages=("other-data",)).fetch(progress=ignore_progress)
    with pytest.raises(UserError, match="apt-get was not found"):
        DebianDescriptions().fetch(progress=ignore_progress)


def test_errors_of_apt_are_passed_on(debian: Apt) -> None:
    debian.problem = "Temporary failure resolving"
    with pytest.raises(UserError, match=r"failed: E: Temporary failure.*run `apt-get update`"):
        DebianCatalogues(packages=("demo-data",)).fetch(progress=ignore_progress)


@pytest.mark.parametrize("damage", ["short", "odd", "cut"])
def test_a_damaged_deb_is_named(tmp_path: Path, damage: str) -> None:
    whole = deb_bytes(FILES)
    path = tmp_path / "demo_1_all.deb"
    path.write_bytes({"short": whole[:100], "odd": b"PK" + whole, "cut": whole[:-60]}[damage])
    with pytest.raises(UserError, match=r"demo_1_all\.deb: (not a Debian|the package is)"):
        list(apt.deb_members(path, pattern=debian_descriptions.re.compile(".")))


def test_descriptions_are_paired_by_paragraph_when_the_english_is_unchanged(debian: Apt) -> None:
    source = DebianDescriptions(languages=("de", "ja"))
    units = source.fetch(progress=ignore_progress)
    found = {
        u.version: [(p.source, p.target) for p in source.read(u, wanted=lambda _: True)]
        for u in units
    }
    assert found["de"] == [
        ("drawing program", "Zeichenprogramm"),
        ("It draws lines and circles on paper:", "Es zeichnet Linien und Kreise auf Papier:"),
        ("many colours", "viele Farben"),
        ("many brushes", "viele Pinsel"),
        ("It is quick.", "Es ist schnell."),
    ]
    assert found["ja"][1][1] == "紙の上に線や円を描きます:"
    source.fetch(progress=ignore_progress)
    assert debian.commands.count("update") == 1


def test_several_sources_make_one_corpus(debian: Apt, tmp_path: Path) -> None:
    files = {"demo/locale/fr/LC_MESSAGES/x.mo": mo_bytes({b"Save file": b"Enregistrer"})}
    write_wheel(tmp_path / "packages/pypi", "wheel", "1.0", files)
    catalogues = PyPICatalogues(packages=(PyPIPackage(name="wheel", version="1.0"),))
    both = CombinedSources(
        sources=(catalogues, DebianCatalogues(packages=("demo-data",)), DebianDescriptions())
    )
    corpus = build_corpus(CorpusRecipe(name="both", source=both, split=ALL_TRAIN))
    assert corpus.languages == ("deu_Latn", "eng_Latn", "fra_Latn", "jpn_Jpan")
    assert set(corpus.manifest["sources"]) == {"wheel", "demo-data", "debian-descriptions"}
    assert corpus.count("en", "de") == 6


def test_the_large_corpus_round_trips_as_yaml() -> None:
    what = named_corpus("software-171")
    assert CorpusRecipe.from_yaml(what.to_yaml()) == what
    assert len(desktop_packages()) > 250
    kinds = {type(source).__name__ for source in what.source.sources}
    assert kinds == {
        "PyPICatalogues",
        "DebianCatalogues",
        "FirefoxMessages",
        "LibreOfficeHelp",
        "DebianDescriptions",
    }
