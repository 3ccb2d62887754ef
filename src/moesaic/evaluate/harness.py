"""Evaluation harness: translate test sets with several systems, score them, return a summary.

Systems are callables: the harness is independent of the model.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moesaic.core.errors import DataError
from moesaic.corpus.placeholders import measure_placeholders
from moesaic.evaluate.bootstrap import (
    BootstrapScores,
    ScoreDifference,
    ScoreInterval,
    bootstrap_resample,
    macro_average,
)
from moesaic.evaluate.check_testset import notes_on_testset
from moesaic.evaluate.evaluation_summary import EvaluationSummary
from moesaic.evaluate.row_groups import row_groups, score_groups
from moesaic.evaluate.seen_rows import SeenRows
from moesaic.evaluate.test_set_result import SampleTranslation, SystemResult, TestSetResult
from moesaic.evaluate.testset import TestSet
from moesaic.evaluate.translation_metrics import (
    ChrF,
    CorpusMetric,
    LanguageIdentifier,
    bleu_for_language,
    load_language_identifier,
    load_spbleu,
    measure_off_target,
)


@runtime_checkable
class TranslationSystem(Protocol):
    """A system: one output per text, in order. ``source`` and ``target`` are language codes."""

    def __call__(self, texts: list[str], *, source: str, target: str) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Bootstrap resamples, their seed, and how many sample sentences per test set are kept."""

    resamples: int = 1000
    seed: int = 0
    samples: int = 5


TraceSample = Callable[[TestSet, SampleTranslation], dict[str, Any] | None]
_Resampled = dict[str, BootstrapScores]
"""Scores of one system on one test set, by metric name."""


def evaluate(
    systems: Mapping[str, TranslationSystem],
    *,
    tests: Sequence[TestSet],
    settings: EvaluationSettings | None = None,
    seen: Mapping[str, SeenRows] | None = None,
    on_result: Callable[[TestSet, TestSetResult], None] = lambda *_: None,
) -> EvaluationSummary:
    """Run every system on every test set and score it.

    The first system is the one under test: differences are its lead over each of the others, paired
    over the same resamples. ``seen`` has, by key of a test set, the rows that were trained on; they
    are scored apart as well. ``on_result`` is called after each test set. Raises DataError if there
    is no test set, or if two have the same key.
    """
    settings = settings or EvaluationSettings()
    _check_inputs(systems, tests)
    loaded = load_language_identifier(sorted({c for t in tests for c in (t.source, t.target)}))
    identify = None if isinstance(loaded, str) else loaded
    spbleu = load_spbleu()
    languages: dict[str, TestSetResult] = {}
    resampled: dict[str, list[_Resampled]] = {name: [] for name in systems}
    for number, test in enumerate(tests):
        metrics: list[CorpusMetric] = [ChrF(), bleu_for_language(test.target)]
        metrics += [spbleu] if not isinstance(spbleu, str) else []
        scorer = _TestSetScorer(
            test, metrics, replace(settings, seed=settings.seed + number), identify
        )
        result = scorer.score_systems(systems, seen=(seen or {}).get(test.key))
        languages[test.key] = result
        for name in systems:
            resampled[name].append(scorer.resampled[name])
        on_result(test, result)
    means = {
        name: {metric: macro_average([row[metric] for row in rows]) for metric in rows[0]}
        for name, rows in resampled.items()
    }
    notes = [f"spBLEU {spbleu}"] if isinstance(spbleu, str) else []
    notes += [f"off-target by identification {loaded}"] if isinstance(loaded, str) else []
    return EvaluationSummary(
        systems=tuple(systems),
        languages=languages,
        mean={name: _intervals(scores) for name, scores in means.items()},
        mean_differences=_differences(means),
        notes=(*_test_notes(languages), *notes),
    )


def _test_notes(languages: Mapping[str, TestSetResult]) -> Iterator[str]:
    """Yield the notes on the rows of each test set."""
    for result in languages.values():
        yield from notes_on_testset(result.test)
        raw = next(iter(result.systems.values())).raw_scores
        if raw:
            yield (
                f"{result.test.name}: against the references as they are in the file, as "
                f"sacreBLEU scores that file: chrF++ {raw['chrf']:.1f}, BLEU {raw['bleu']:.1f}"
            )


def add_expert_traces(summary: EvaluationSummary, *, trace: TraceSample) -> EvaluationSummary:
    """Return a copy in which each sample has ``trace(test, sample)``: the experts of its tokens."""
    languages = {
        key: replace(
            result,
            samples=tuple(replace(s, experts=trace(result.test, s)) for s in result.samples),
        )
        for key, result in summary.languages.items()
    }
    return replace(summary, languages=languages)


class _TestSetScorer:
    """Scores systems on one test set; keeps the resampled scores for means and differences."""

    def __init__(
        self,
        test: TestSet,
        metrics: Sequence[CorpusMetric],
        settings: EvaluationSettings,
        identify: LanguageIdentifier | None,
    ) -> None:
        self._test, self._metrics, self._settings = test, metrics, settings
        self._identify = identify
        self.resampled: dict[str, _Resampled] = {}
        self._statistics: dict[str, dict[str, np.ndarray]] = {}

    def score_systems(
        self, systems: Mapping[str, TranslationSystem], *, seen: SeenRows | None
    ) -> TestSetResult:
        test = self._test
        outputs: dict[str, list[str]] = {}
        results: dict[str, SystemResult] = {}
        for name, translate in systems.items():
            began = time.perf_counter()
            outputs[name] = translate(list(test.sources), source=test.source, target=test.target)
            seconds = time.perf_counter() - began
            if len(outputs[name]) != len(test):
                raise ValueError(
                    f"{name} returned {len(outputs[name])} outputs for {len(test)} sentences"
                )
            results[name] = self._score(name, outputs[name], seconds=seconds)
        signatures = {metric.name: metric.signature for metric in self._metrics}
        samples = self._samples(outputs)
        groups = score_groups(
            row_groups(test, seen), metrics=self._metrics, statistics=self._statistics
        )
        leads = _differences(self.resampled)
        return TestSetResult(test, signatures, results, leads, samples, groups)

    def _score(self, name: str, outputs: list[str], *, seconds: float) -> SystemResult:
        references = self._test.references
        self._statistics[name] = {
            metric.name: metric.sentence_statistics(outputs, references=references)
            for metric in self._metrics
        }
        self.resampled[name] = {
            metric.name: bootstrap_resample(
                metric.score,
                statistics=self._statistics[name][metric.name],
                resamples=self._settings.resamples,
                seed=self._settings.seed,
            )
            for metric in self._metrics
        }
        off_target = measure_off_target(
            outputs, references=references, target=self._test.target, identify=self._identify
        )
        empty = sum(not text.strip() for text in outputs)
        return SystemResult(
            _intervals(self.resampled[name]),
            off_target,
            empty,
            seconds,
            placeholders=measure_placeholders(self._test.sources, outputs),
            raw_scores=self._raw_scores(outputs),
        )

    def _raw_scores(self, outputs: list[str]) -> dict[str, float]:
        """Return the scores against the references of the file, if these were normalised."""
        raw = self._test.raw_references
        if not raw:
            return {}
        found = {m.name: m.sentence_statistics(outputs, references=raw) for m in self._metrics}
        return {m.name: float(m.score(found[m.name].sum(0))) for m in self._metrics}

    def _samples(self, outputs: Mapping[str, list[str]]) -> tuple[SampleTranslation, ...]:
        """Return samples at even distances in the test set, independent of their quality."""
        test = self._test
        count = min(self._settings.samples, len(test))
        chosen = [(2 * i + 1) * len(test) // (2 * count) for i in range(count)]
        return tuple(
            SampleTranslation(
                test.sources[i], test.references[i], {name: o[i] for name, o in outputs.items()}
            )
            for i in chosen
        )


def _intervals(scores: _Resampled) -> dict[str, ScoreInterval]:
    return {metric: score.confidence_interval() for metric, score in scores.items()}


def _differences(scores: Mapping[str, _Resampled]) -> dict[str, dict[str, ScoreDifference]]:
    """Return the lead of the first system over each other one, by metric."""
    first, *others = scores
    return {
        other: {m: scores[first][m].compare(scores[other][m]) for m in scores[first]}
        for other in others
    }


def _check_inputs(systems: Mapping[str, TranslationSystem], tests: Sequence[TestSet]) -> None:
    if not systems:
        raise ValueError("evaluate needs at least one system")
    if not tests:
        raise DataError("nothing to evaluate: no test set was given")
    keys = [test.key for test in tests]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise DataError(
            f"two test sets for {', '.join(repeated)}: evaluate them one after the other"
        )
