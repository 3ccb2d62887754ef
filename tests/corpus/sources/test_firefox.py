from collections.abc import Mapping
from pathlib import Path

import pytest
from catalogue_files import deb_bytes, zip_bytes

from moesaic.core.errors import UserError
from moesaic.corpus.pair import Pair, RejectedPair
from moesaic.corpus.sources import apt
from moesaic.corpus.sources.firefox import FirefoxMessages
from moesaic.corpus.sources.text_source import ignore_progress

CANADA = {
    "browser.ftl": "quit = Quit { -brand }\n    .accesskey = Q\nhide = { $on ->\n [true] Hide\n"
    "*[other] Show\n }\ncolour = Colour\ntabs = { $n ->\n [one] a tab\n*[other] { $n } tabs\n }",
    "a.properties": "saved = %1$S saved as %S\nmore.accesskey = m\nshow = One node;All #1 nodes\n"
    "pkcs = PKCS#11 and PKCS #12; both\nopen.key = o",
}
BRITAIN = {"browser.ftl": "colour = British colour\nlift = Lift"}
GERMAN = {
    "browser.ftl": '-brand = X\nquit = { -brand(case: "a") } beenden\n    .accesskey = B\n'
    "hide = { $on ->\n*[true] Verbergen\n [other] Zeigen\n }\ncolour = Farbe\nlift = Aufzug\n"
    "tabs = { $n ->\n [one] ein Tab\n*[many] { $n } Tabs\n }\nown = Nur hier",
    "a.properties": "saved = %1$S gesichert als %S\nmore.accesskey = e\n"
    "show = Ein Knoten;Alle #1 Knoten\npkcs = PKCS#11 und PKCS #12; beide\nopen.key = o",
}


def write_pack(folder: Path, locale: str, files: Mapping[str, str], data: bytes = b"") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inside = {f"localization/{locale}/{name}": text.encode() for name, text in files.items()}
    pack = f"./usr/lib/firefox-esr/browser/extensions/langpack-{locale}@firefox.org.xpi"
    path = folder / f"firefox-esr-l10n-{locale.lower()}_140_all.deb"
    path.write_bytes(deb_bytes({pack: data or zip_bytes(inside)}))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_HOME", str(tmp_path))
    monkeypatch.setattr(apt.shutil, "which", lambda _: None)
    folder = tmp_path / "packages/deb"
    write_pack(folder, "de", GERMAN)
    write_pack(folder, "es-MX", GERMAN)
    return folder


def test_messages_are_paired_by_file_and_key_and_canada_comes_before_britain(home: Path) -> None:
    write_pack(home, "en-CA", CANADA)
    write_pack(home, "en-GB", BRITAIN)
    [unit] = FirefoxMessages().fetch(progress=ignore_progress)
    assert unit.name == "firefox-esr-l10n-de"
    found = list(FirefoxMessages().read(unit, wanted=lambda _: True))
    assert [(p.source, p.target) for p in found if isinstance(p, Pair)] == [
        ("Quit {-brand}", "{-brand} beenden"),
        ("Colour", "Farbe"),
        ("Lift", "Aufzug"),
        ("{$n} tabs", "{$n} Tabs"),
        ("%1$s saved as %s", "%1$s gesichert als %s"),
        ("All %1$s nodes", "Alle %1$s Knoten"),
        ("PKCS#11 and PKCS #12; both", "PKCS#11 und PKCS #12; beide"),
    ]
    assert {p.target_language for p in found} == {"deu_Latn"}
    # the default of the one is not the default of the other: not a translation
    assert [p.reason for p in found if isinstance(p, RejectedPair)] == ["disagree"]


def test_one_english_package_suffices_and_none_is_an_error(home: Path) -> None:
    with pytest.raises(
        UserError, match="firefox-esr-l10n-en-ca and firefox-esr-l10n-en-gb could not be"
    ):
        FirefoxMessages().fetch(progress=ignore_progress)
    write_pack(home, "en-GB", BRITAIN)
    [unit] = FirefoxMessages().fetch(progress=ignore_progress)
    pairs = list(FirefoxMessages().read(unit, wanted=lambda _: True))
    assert [p.source for p in pairs if isinstance(p, Pair)] == ["British colour", "Lift"]
    assert list(FirefoxMessages().read(unit, wanted=lambda _: False)) == []


def test_a_damaged_language_pack_is_named(home: Path) -> None:
    write_pack(home, "en-CA", CANADA)
    write_pack(home, "de", {}, data=b"PK no zip")
    [unit] = FirefoxMessages().fetch(progress=ignore_progress)
    with pytest.raises(UserError, match=r"l10n-de_140_all\.deb: .*langpack-de.* is damaged"):
        list(FirefoxMessages().read(unit, wanted=lambda _: True))
