import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.corpus.cleaning import CLEANING_RULES, CleaningConfig, PairCleaner, normalise_text
from moesaic.corpus.pair import Pair


def reason(source: str, target: str, code: str = "deu_Latn", **config: float) -> str:
    return PairCleaner(CleaningConfig(**config)).clean(Pair(source, target, "eng_Latn", code))[1]


def test_a_good_pair_is_kept_and_normalised() -> None:
    pair = Pair(
        "_Save <b>%s</b> &amp;  close", "%s  speichern und schließen", "eng_Latn", "deu_Latn"
    )
    kept, why = PairCleaner(CleaningConfig()).clean(pair)
    assert why == ""
    assert kept is not None
    assert (kept.source, kept.target) == ("Save %s & close", "%s speichern und schließen")


@pytest.mark.parametrize(
    ("rule", "source", "target", "code"),
    [
        ("empty", "<br/>", "Zeile", "deu_Latn"),
        ("too_long", "word " * 200, "Wort " * 200, "deu_Latn"),
        ("broken", "A café", "Ein Caf\ufffd", "deu_Latn"),
        ("untranslated", "Save", "save", "deu_Latn"),
        ("few_letters", "12:30 +00", "12:30 a", "deu_Latn"),
        ("length_ratio", "Yes, please do that now and for all files", "Ja", "deu_Latn"),
        ("placeholders", "Hello %(name)s", "Hallo %(nmae)s", "deu_Latn"),
        ("script", "Save the file", "Speichern der Datei", "rus_Cyrl"),
    ],
)
def test_each_rule_drops_what_it_names(rule: str, source: str, target: str, code: str) -> None:
    assert reason(source, target, code) == rule


def test_every_rule_has_a_case_above() -> None:
    tried = {"empty", "too_long", "broken", "untranslated", "few_letters", "length_ratio"}
    assert {rule.name for rule in CLEANING_RULES} == tried | {"placeholders", "script"}


def test_words_shared_with_the_source_do_not_count_against_the_script() -> None:
    assert reason("Django administration site", "Django 管理", "zho_Hans") == ""
    assert reason("Use the URL of the API", "Use the URL of the API 。", "zho_Hans") == "script"


def test_thresholds_are_configurable() -> None:
    assert reason("Save the file", "Speichern der Datei", "rus_Cyrl", min_script=0) == ""


@settings(deadline=None)
@given(st.text(max_size=60))
def test_normalising_leaves_no_control_characters_and_single_spaces(text: str) -> None:
    done = normalise_text(text)
    assert done == " ".join(done.split())
    assert not any(ord(c) < 32 for c in done)
