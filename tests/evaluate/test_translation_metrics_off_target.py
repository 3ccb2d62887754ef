import importlib.util

import pytest

from moesaic.evaluate.translation_metrics import load_language_identifier, measure_off_target

GERMAN = "Die Datei konnte nicht geöffnet werden, weil sie beschädigt ist."
ENGLISH = "The file could not be opened because it is damaged."
RUSSIAN = "Не удалось открыть файл, потому что он повреждён."


def test_another_script_is_off_target():
    found = measure_off_target(
        [RUSSIAN, ENGLISH, ENGLISH, ""],
        references=[RUSSIAN] * 4,
        target="rus_Cyrl",
        identify=None,
    )
    assert (found.script.off, found.script.counted) == (2, 3)  # the empty one is in no language
    assert found.script.rate == pytest.approx(2 / 3)


def test_names_that_stay_as_they_are_accuse_nobody():
    found = measure_off_target(
        ["LibreOffice Writer"],
        references=["LibreOffice Writer"],
        target="rus_Cyrl",
        identify=None,
    )
    assert found.script.counted == 0
    assert found.script.rate is None


@pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="needs py3langid")
def test_another_language_of_the_same_script_is_identified():
    identify = load_language_identifier(["deu_Latn", "eng_Latn", "fra_Latn"])
    found = measure_off_target(
        [ENGLISH, GERMAN, "Datei"],
        references=[GERMAN, GERMAN, "Datei"],
        target="deu_Latn",
        identify=identify,
    )
    assert found.script.off == 0
    assert (found.identified.off, found.identified.counted) == (1, 2)  # "Datei" is too short


def test_missing_identification_gives_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    found = load_language_identifier(["deu_Latn", "eng_Latn"])
    assert isinstance(found, str)
    assert "moesaic[lid]" in found


@pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="needs py3langid")
def test_languages_that_the_identifier_lacks_are_not_measured():
    identify = load_language_identifier(["deu_Latn", "eng_Latn", "szl_Latn"])
    found = measure_off_target([ENGLISH], references=[GERMAN], target="szl_Latn", identify=identify)
    assert found.identified.rate is None
    assert found.identified.note
