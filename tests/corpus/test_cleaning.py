import pytest

from moesaic.core.errors import ConfigError
from moesaic.corpus.cleaning import CLEANING_RULES, CleaningConfig, PairCleaner
from moesaic.corpus.pair import Pair, Text
from moesaic.corpus.text_rules import SoftwareStrings

SOFTWARE = CleaningConfig(text_rules=SoftwareStrings())


def reason(source: str, target: str, code: str = "deu_Latn", **config: float) -> str:
    return PairCleaner(SOFTWARE.replace(**config)).clean(Pair(source, target, "eng_Latn", code))[1]


def test_a_good_pair_is_kept_and_normalised() -> None:
    pair = Pair(
        "_Save <b>%s</b> &amp;  close", "%s  speichern und schließen", "eng_Latn", "deu_Latn"
    )
    kept, why = PairCleaner(SOFTWARE).clean(pair)
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


def test_marks_of_general_text_are_kept_on_both_sides() -> None:
    pair = Pair("It is ~5 km, Q&As: $US five", "Es sind ~5 km, Fragen", "eng_Latn", "deu_Latn")
    kept, why = PairCleaner(CleaningConfig()).clean(pair)
    assert (kept, why) == (pair, "")


def test_a_disabled_rule_drops_nothing() -> None:
    cleaner = PairCleaner(CleaningConfig(disabled_rules=("untranslated", "script")))
    assert cleaner.clean(Pair("Taxi", "Taxi", "eng_Latn", "deu_Latn"))[1] == ""
    assert cleaner.clean(Pair("Save the file", "Speichern", "eng_Latn", "rus_Cyrl"))[1] == ""


@pytest.mark.parametrize(("name", "hint"), [("scripts", 'mean "script"'), ("empty", "expected")])
def test_a_rule_that_cannot_be_disabled_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        CleaningConfig(disabled_rules=(name,))


def test_text_in_one_language_is_normalised_like_pairs() -> None:
    cleaner = PairCleaner(CleaningConfig())
    text, _ = cleaner.clean_text(Text("Tu\u0308r\xad\xa0zu", "deu_Latn", "a", "MIT"))
    assert text == Text("Tür zu", "deu_Latn", "a", "MIT")
    assert cleaner.clean_text(Text("Caf\ufffd", "deu_Latn"))[1] == "broken"
    assert cleaner.clean_text(Text("\u200b", "deu_Latn"))[1] == "empty"
