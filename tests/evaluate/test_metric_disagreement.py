"""Where chrF++ and BLEU disagree, the reason given is the one in the rows."""

from moesaic.evaluate.baselines import copy_source
from moesaic.evaluate.harness import EvaluationSettings, evaluate
from moesaic.evaluate.metric_disagreement import metric_disagreements
from moesaic.evaluate.testset import TestSet

NAMES = tuple(f"{a} Studio {b} Edition Server" for a in ("Alpha", "Beta", "Gamma") for b in "XYZ")
TEXTS = tuple(f"wholly unlike thing number {n}" for n in range(12))
GERMAN = tuple(f"ganz andersartige Sachen Nummer{n}" for n in range(12))


def _summary(system):
    test = TestSet(
        name="x", source="eng_Latn", target="deu_Latn",
        sources=NAMES + TEXTS, references=NAMES + GERMAN,
    )  # fmt: skip
    return evaluate(
        {"model": system, "copy": copy_source},
        tests=[test],
        settings=EvaluationSettings(resamples=20, samples=0),
    )


def test_rows_that_copying_gets_right_by_definition_are_named_as_the_reason():
    def near_misses(texts, **_):  # parts of words right everywhere, whole words seldom
        return [f"{' '.join(w + 'e' for w in t.split())}" for t in NAMES + GERMAN]

    found = _summary(near_misses)
    lead = found.languages["deu_Latn"].differences["copy"]
    assert lead["chrf"].difference > 0 > lead["bleu"].difference
    [sentence] = metric_disagreements(found.systems, found.languages)
    assert "disagree in 1 of 1" in sentence
    assert "above by chrF++" in sentence
    assert "below by BLEU" in sentence
    assert "rows whose reference equals the source are 43%" in sentence
    assert found.to_dict()["disagreements"] == [sentence]
    assert found.to_dict()["verdicts_bleu"]["copy"]["worse"] == ["deu_Latn"]


def test_nothing_is_said_where_the_metrics_agree():
    found = _summary(lambda *_, **__: list(NAMES + GERMAN))
    assert list(metric_disagreements(found.systems, found.languages)) == []


def test_placeholders_kept_are_counted_for_each_system():
    test = TestSet(
        name="x", source="eng_Latn", target="deu_Latn",
        sources=("Open %s now", "<b>No</b> {name}", "plain"), references=("a", "b", "c"),
    )  # fmt: skip
    found = evaluate(
        {"model": lambda *_, **__: ["Öffne %s", "Nein", "x"], "copy": copy_source},
        tests=[test],
        settings=EvaluationSettings(resamples=10, samples=0),
    ).to_dict()
    rates = {system: found["placeholders"][system]["rate"] for system in ("model", "copy")}
    assert rates == {"model": 0.5, "copy": 1.0}
    assert found["languages"]["deu_Latn"]["model"]["placeholders"]["of"] == 2
    assert found["languages"]["deu_Latn"]["groups"]["marked"]["count"] == 2
