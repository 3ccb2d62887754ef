import os
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from catalogue_files import mo_bytes, write_wheel

from moesaic.core.errors import UserError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe, named_corpus
from moesaic.corpus.sources import package_archives
from moesaic.corpus.sources.gettext_catalogues import (
    PyPICatalogues,
    choose_members,
    member_language,
)
from moesaic.corpus.sources.package_archives import (
    ArchiveMember,
    PyPIPackage,
    archive_members,
    fetch_package,
)
from moesaic.corpus.sources.text_source import ignore_progress

GERMAN = mo_bytes({b"Save file": b"Datei sichern", b"Open it": "Öffne es".encode()})
FRENCH = mo_bytes({b"Save file": b"Enregistrer", b"save_file_label": b"Cle"})
NOT_THERE = "ERROR: No matching distribution found for demo==1.2.3"


class Pip:
    """Stands in for pip: has wheels, or says why not."""

    def __init__(self, versions: dict[str, str], problem: str = NOT_THERE) -> None:
        self.versions, self.problem, self.asked = versions, problem, []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        wanted, folder = command[-1], Path(command[command.index("--dest") + 1])
        self.asked.append(wanted)
        if wanted not in self.versions:
            return subprocess.CompletedProcess(command, 1, "", f"WARNING: x\n{self.problem}\n")
        write_wheel(folder, "demo", self.versions[wanted], FILES)
        return subprocess.CompletedProcess(command, 0, "", "")


FILES = {
    "demo/locale/de/LC_MESSAGES/django.mo": GERMAN,
    "demo/locale/de/LC_MESSAGES/django.po": b"not read, the .mo is there",
    "demo/locale/fr_FR/LC_MESSAGES/django.mo": FRENCH,
    "demo/locale/es_MX/LC_MESSAGES/django.mo": GERMAN,
    "demo/locale/en/LC_MESSAGES/django.mo": GERMAN,
}
DEMO = PyPIPackage(name="demo", version="1.2.3")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))


def with_pip(monkeypatch: pytest.MonkeyPatch, pip: Pip) -> Pip:
    monkeypatch.setattr(package_archives.subprocess, "run", pip)
    return pip


def test_a_package_is_downloaded_once_and_then_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = with_pip(monkeypatch, Pip({"demo==1.2.3": "1.2.3"}))
    first = fetch_package(DEMO, progress=ignore_progress)
    again = fetch_package(DEMO, progress=ignore_progress)
    assert first == again
    assert (first.version, first.licence) == ("1.2.3", "BSD-3-Clause")
    assert pip.asked == ["demo==1.2.3"]
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


def test_an_unavailable_version_is_replaced_by_the_nearest_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_pip(monkeypatch, Pip({"demo==1.2.*": "1.2.9", "demo": "7.0"}))
    reported: list[str] = []
    assert fetch_package(DEMO, progress=reported.append).version == "1.2.9"
    assert "demo 1.2.3 is not available, using 1.2.9" in reported[-1]


def test_without_a_network_a_cached_version_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(package_archives.packages_dir() / "pypi", "demo", "1.1", FILES)
    with_pip(monkeypatch, Pip({}, problem="ERROR: Connection refused"))
    assert fetch_package(DEMO, progress=ignore_progress).version == "1.1"


def test_without_a_network_or_a_cached_package_the_error_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_pip(monkeypatch, Pip({}, problem="ERROR: Connection refused"))
    with pytest.raises(UserError, match=r"demo 1\.2\.3.*Connection refused.*PIP_INDEX_URL.*wheel"):
        fetch_package(DEMO, progress=ignore_progress)


def test_a_package_becomes_a_corpus_without_variants_keys_or_english(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_pip(monkeypatch, Pip({"demo==1.2.3": "1.2.3"}))
    corpus = build_corpus(CorpusRecipe(name="demo", source=PyPICatalogues(packages=(DEMO,))))
    assert corpus.path == tmp_path / "corpora/demo"
    assert corpus.directions == (("eng_Latn", "deu_Latn"), ("eng_Latn", "fra_Latn"))
    found = {(p.source, p.target) for s in ("train", "valid", "test") for p in corpus.pairs(s)}
    assert found == {
        ("Save file", "Datei sichern"),
        ("Open it", "Öffne es"),
        ("Save file", "Enregistrer"),
    }
    assert corpus.manifest["sources"] == {
        "demo": {"version": "1.2.3", "licence": "BSD-3-Clause", "pairs": 3, "texts": 0}
    }


def test_a_package_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(UserError, match="listed twice: demo"):
        PyPICatalogues(packages=(DEMO, DEMO))


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "demo", "1.2.3", FILES)
    path.write_bytes(path.read_bytes()[:-200])
    with (
        pytest.raises(UserError, match=r"demo-1\.2\.3.*damaged.*delete it and build again"),
        archive_members(path),
    ):
        pass


def test_a_source_archive_is_read_like_a_wheel(tmp_path: Path) -> None:
    path = tmp_path / "demo-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("demo-1.0/po/de.po")
        info.size = 4
        tar.addfile(info, BytesIO(b"text"))
    with archive_members(path) as files:
        assert [(m.name, m.read()) for m in files] == [("demo-1.0/po/de.po", b"text")]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("django/conf/locale/de/LC_MESSAGES/django.mo", "deu_Latn"),
        ("cms/locale/zh-Hans/LC_MESSAGES/django.mo", "zho_Hans"),
        ("gramps/po/pt_BR.po", "por_Latn_BR"),
        ("plone/locales/sr@latin/LC_MESSAGES/plone.po", "srp_Latn"),
        ("x/locale/es_AR/LC_MESSAGES/django.mo", None),
        ("office/resource/de/LC_MESSAGES/sw.mo", "deu_Latn"),  # Writer, not Swahili
        ("office/resource/es_MX/LC_MESSAGES/sc.mo", None),  # nor Sardinian
        ("game/translations/fi/LC_MESSAGES/game-tb.mo", "fin_Latn"),
        ("x/templates/mail.mo", None),
    ],
)
def test_the_language_of_a_catalogue_is_read_from_its_path(name: str, code: str | None) -> None:
    found = member_language(name)
    assert (found.code if found else None) == code


@pytest.mark.parametrize(("kind", "chosen"), [("mo", "a.mo"), ("po", "a.po")])
def test_a_catalogue_in_two_formats_is_read_once(kind: str, chosen: str) -> None:
    files = [ArchiveMember(n, bytes) for n in ("a.po", "a.mo", "b.po", "c.txt")]
    assert [m.name for m in choose_members(files, kind=kind)] == [chosen, "b.po"]


@pytest.mark.network
@pytest.mark.skipif(
    not os.environ.get("MOESAIC_NETWORK"), reason="downloads 27 MB: set MOESAIC_NETWORK=1"
)
def test_the_small_corpus_has_the_published_size() -> None:
    corpus = build_corpus("catalogues-small")
    assert 110_000 < corpus.manifest["pairs"] < 150_000
    assert len(corpus.languages) >= 85
    corpus.verify()


def test_the_named_corpora_round_trip_as_yaml() -> None:
    for name in ("catalogues-small", "catalogues"):
        what = named_corpus(name)
        assert CorpusRecipe.from_yaml(what.to_yaml()) == what
