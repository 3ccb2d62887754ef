"""Directions: the language pairs of each choice."""

import pytest

import pipeline_cases as cases
from moesaic.core.errors import DataError
from moesaic.data.tasks import (
    BothDirections,
    FromEnglish,
    ListedDirections,
    PivotDirections,
    StoredDirections,
    ToEnglish,
    Translation,
)

FORTH = [("eng_Latn", code) for code in ("deu_Latn", "ell_Grek", "jpn_Jpan")]
BACK = [(target, source) for source, target in FORTH]


@pytest.mark.parametrize(
    ("directions", "expected"),
    [
        (FromEnglish(), FORTH),
        (ToEnglish(), BACK),
        (StoredDirections(), FORTH),
        (BothDirections(), sorted(FORTH + BACK)),
        (ListedDirections(pairs=("jpn_Jpan-eng_Latn",)), [("jpn_Jpan", "eng_Latn")]),
        (
            PivotDirections(languages=("deu_Latn", "jpn_Jpan")),
            [("deu_Latn", "jpn_Jpan"), ("jpn_Jpan", "deu_Latn")],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_language_pairs_of_directions(directions, expected):
    assert directions.language_pairs(cases.shards()) == expected
    task = Translation(directions=directions)
    streams = task.streams(cases.shards(), languages=cases.LANGUAGES, split="train")
    assert [(s.source_language, s.target_language) for s in streams] == expected
    assert all(s.size > 0 for s in streams)


def test_an_unknown_direction_is_refused_with_the_nearest():
    for wrong in ("eng_Latn-fra_Latn", "deu_Latn", "eng_Latn>deu_Latn"):
        with pytest.raises(DataError, match="eng_Latn-deu_Latn"):
            ListedDirections(pairs=(wrong,)).language_pairs(cases.shards())


def test_languages_outside_of_the_run_have_no_streams():
    chosen = ("eng_Latn", "ell_Grek")
    streams = Translation().streams(cases.shards(), languages=chosen, split="train")
    assert [s.target_language for s in streams] == ["ell_Grek"]
