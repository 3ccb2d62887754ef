from collections.abc import Mapping
from pathlib import Path

import pytest
from catalogue_files import deb_bytes

from moesaic.core.errors import UserError
from moesaic.corpus.build_corpus import build_corpus
from moesaic.corpus.corpus_recipes import CorpusRecipe
from moesaic.corpus.pair import Pair, RejectedPair
from moesaic.corpus.sources import apt
from moesaic.corpus.sources.libreoffice_help import LibreOfficeHelp, parse_help_page
from moesaic.corpus.sources.text_source import ignore_progress
from moesaic.corpus.split import SplitConfig

SWITCH = (
    '<span id="swlnsys_1" class="switchinline"><span hidden="true" id="MAC_1" class="MAC">'
    '<span class="keycode">{mac}</span></span><span hidden="true" id="default_1">'
    '<span class="keycode">{pc}</span></span></span><span class="keycode">+D</span>'
)
ENGLISH = {
    "par_1": f"Press {SWITCH.format(mac='Command', pc='Ctrl')} to copy.",
    "par_2": 'Choose <span class="emph">Insert</span>.',
    "par_3": "Created in 2004.",
    "par_4": 'Click <a href="x">here</a> &lt;now&gt;.',
}
GERMAN = {
    "par_1": f"Zum Kopieren {SWITCH.format(mac='Befehl', pc='Strg')} drücken.",
    "par_2": "Wählen Sie Einfügen.",
    "par_3": "Im Jahr 2005 erstellt.",
    "par_4": 'Hier <a href="y">klicken</a> &lt;now&gt;.',
    "par_5": "Nur auf Deutsch.",
}


def page(texts: Mapping[str, str]) -> str:
    return "<body><p>no id</p>" + "".join(
        f'<div><p id="{key}" class="paragraph" dir="auto">{text}</p>\n</div>'
        for key, text in texts.items()
    )


def write_help(folder: Path, locale: str, texts: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        f"./usr/share/libreoffice/help/{locale}/text/shared/{name}.html": page(texts).encode()
        for name in ("a", "b")
    }
    path = folder / f"libreoffice-help-{locale.lower()}_7_all.deb"
    path.write_bytes(deb_bytes(files))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    monkeypatch.setattr(apt.shutil, "which", lambda _: None)
    return tmp_path


def test_the_default_variant_of_a_system_dependent_text_is_read() -> None:
    found = {k.key: k.text for k in parse_help_page(page(ENGLISH))}
    assert found["par_1"] == "Press Ctrl+D to copy."
    assert found["par_4"] == "Click here <now>."
    only_mac = 'Do it.<span hidden="true" class="MAC"> On a <b><span>Mac</span></b>.</span> Now.'
    assert [k.text for k in parse_help_page(page({"par_9": only_mac}))] == ["Do it. Now."]


def test_listings_of_code_and_paragraphs_without_id_are_left_out() -> None:
    code = '<p id="par_1" class="bascode">Print "x"</p><p id="par_2" class="code">y</p>'
    assert list(parse_help_page(code + page({}))) == []
    assert list(parse_help_page("")) == []


def test_paragraphs_are_paired_by_page_and_id_and_a_row_that_disagrees_is_counted(
    home: Path,
) -> None:
    write_help(home / "packages/deb", "en-US", ENGLISH)
    write_help(home / "packages/deb", "de", GERMAN)
    write_help(home / "packages/deb", "en-GB", ENGLISH)
    [unit] = LibreOfficeHelp().fetch(progress=ignore_progress)
    found = list(LibreOfficeHelp().read(unit, wanted=lambda _: True))
    pairs = [(p.source, p.target) for p in found if isinstance(p, Pair)]
    assert pairs[:2] == [
        ("Press Ctrl+D to copy.", "Zum Kopieren Strg+D drücken."),
        ("Click here <now>.", "Hier klicken <now>."),
    ]
    assert len(pairs) == 4
    assert [p.reason for p in found if isinstance(p, RejectedPair)] == ["disagree"] * 4
    what = CorpusRecipe(name="h", source=LibreOfficeHelp(), split=SplitConfig(test=0, valid=0))
    [direction] = build_corpus(what, out=home / "c").manifest["directions"]
    assert (direction["read"], direction["dropped"]) == (8, {"disagree": 4, "duplicate": 2})


def test_without_the_english_package_there_is_nothing_to_pair(home: Path) -> None:
    write_help(home / "packages/deb", "de", GERMAN)
    with pytest.raises(UserError, match="libreoffice-help-en-us could not be downloaded"):
        LibreOfficeHelp().fetch(progress=ignore_progress)


def test_a_language_that_is_not_wanted_is_not_read(home: Path) -> None:
    write_help(home / "packages/deb", "en-US", ENGLISH)
    write_help(home / "packages/deb", "de", GERMAN)
    [unit] = LibreOfficeHelp().fetch(progress=ignore_progress)
    assert list(LibreOfficeHelp().read(unit, wanted=lambda code: code == "fra_Latn")) == []
