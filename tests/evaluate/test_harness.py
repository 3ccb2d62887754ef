import json

import pytest

from moesaic.core.errors import DataError
from moesaic.corpus.languages import resolve_language
from moesaic.evaluate.baselines import copy_source
from moesaic.evaluate.harness import EvaluationSettings, add_expert_traces, evaluate
from moesaic.evaluate.testset import TestSet

SOURCES = ("Open the file", "Close the file", "Save the file", "Print the page", "Quit now", "Yes")
GERMAN = (
    "Die Datei öffnen", "Die Datei schließen", "Die Datei speichern", "Die Seite drucken",
    "Jetzt beenden", "Ja",
)  # fmt: skip
FRENCH = (
    "Ouvrir le fichier", "Fermer le fichier", "Enregistrer le fichier", "Imprimer la page",
    "Quitter maintenant", "Oui",
)  # fmt: skip
SETTINGS = EvaluationSettings(resamples=200, samples=3)


def _test(target, references, source="eng_Latn"):
    return TestSet(name="six", source=source, target=target, sources=SOURCES, references=references)


TESTS = [_test("deu_Latn", GERMAN), _test("fra_Latn", FRENCH)]


def oracle_but_french(texts, *, source, target):
    """Perfect German, French left in English."""
    return list(GERMAN) if target == "deu_Latn" else list(texts)


def perfect(texts, *, source, target):
    return list(GERMAN if target == "deu_Latn" else FRENCH)


@pytest.fixture(scope="module")
def summary():
    systems = {"model": oracle_but_french, "copy": copy_source, "memory": perfect}
    return evaluate(systems, tests=TESTS, settings=SETTINGS)


def test_scores_and_differences_show_the_better_system_of_each_language(summary):
    german, french = summary.languages["deu_Latn"], summary.languages["fra_Latn"]
    assert german.systems["model"].scores["chrf"].score == pytest.approx(100)
    assert german.differences["memory"]["chrf"].difference == 0
    assert french.systems["model"].scores == french.systems["copy"].scores
    assert summary.verdicts() == {
        "copy": {"better": ["deu_Latn"], "worse": [], "unclear": ["fra_Latn"]},
        "memory": {"better": [], "worse": ["fra_Latn"], "unclear": ["deu_Latn"]},
    }


def test_means_weigh_every_language_alike(summary):
    scores = [r.systems["model"].scores["chrf"].score for r in summary.languages.values()]
    assert summary.mean["model"]["chrf"].score == pytest.approx(sum(scores) / 2)
    lead = summary.mean_differences["memory"]["chrf"]
    assert lead.difference == pytest.approx((scores[1] - 100) / 2)
    assert lead.high < 0


def test_the_file_holds_what_its_docstring_promises(summary, tmp_path):
    result = summary.with_run_facts(
        run="demo", counts={"parameters": 7}, seconds={"train": 1.23456}
    )
    result.write(tmp_path / "summary.json")
    found = json.loads((tmp_path / "summary.json").read_text())
    german = found["languages"]["deu_Latn"]
    assert german["name"] == resolve_language("deu_Latn").name
    assert german["count"] == len(SOURCES)
    assert set(german["model"]) == {
        *("chrf", "bleu", "off_target", "empty", "placeholders", "raw_references", "seconds"),
    }
    assert set(german["model"]["chrf"]) == {"score", "low", "high"}
    assert german["differences"]["copy"]["verdict"] == "better"
    assert "tok:13a" in german["signatures"]["bleu"]
    assert found["systems"] == ["model", "copy", "memory"]
    assert found["verdicts"]["memory"]["worse"] == ["fra_Latn"]
    assert found["counts"] == {"parameters": 7}
    assert found["seconds"] == {"train": 1.235}
    assert {"python", "torch", "sacrebleu", "moesaic"} <= set(found["versions"])
    assert any("spBLEU" in note for note in found["notes"])
    json.dumps(found, allow_nan=False)


def test_samples_are_spread_over_the_test_set_and_can_be_traced(summary):
    samples = summary.languages["deu_Latn"].samples
    assert [s.source for s in samples] == [SOURCES[1], SOURCES[3], SOURCES[5]]
    assert samples[0].outputs["memory"] == GERMAN[1]
    result = add_expert_traces(summary, trace=lambda test, s: {"who": f"{test.target} {s.source}"})
    plain = result.to_dict()["languages"]["deu_Latn"]["samples"][0]
    assert plain["experts"] == {"who": "deu_Latn Close the file"}


def test_a_direction_into_english_has_its_own_key():
    into = _test("eng_Latn", SOURCES, source="deu_Latn")
    assert into.key == "deu_Latn-eng_Latn"
    found = evaluate({"model": copy_source}, tests=[into, *TESTS], settings=SETTINGS)
    assert list(found.languages) == ["deu_Latn-eng_Latn", "deu_Latn", "fra_Latn"]
    names = {key: row["name"] for key, row in found.to_dict()["languages"].items()}
    assert names["deu_Latn-eng_Latn"] == "German → English"
    assert names["deu_Latn"] == "German"


def test_a_system_that_loses_lines_is_a_bug_and_is_named():
    with pytest.raises(ValueError, match="broken returned 5 outputs for 6 sentences"):
        evaluate({"broken": lambda texts, **_: texts[1:]}, tests=TESTS, settings=SETTINGS)


def test_no_test_set_and_two_for_one_language_are_refused():
    with pytest.raises(DataError, match="no test set"):
        evaluate({"copy": copy_source}, tests=[])
    with pytest.raises(DataError, match="deu_Latn"):
        evaluate({"copy": copy_source}, tests=[TESTS[0], TESTS[0]])


def test_empty_outputs_are_counted():
    found = evaluate({"silent": lambda *_, **__: [""] * 6}, tests=TESTS, settings=SETTINGS)
    assert found.languages["deu_Latn"].systems["silent"].empty == 6
    assert found.mean["silent"]["chrf"].score == 0
