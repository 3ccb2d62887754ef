"""The harness: systems and test sets in, a Summary out. It knows no model, only callables.

Letters: N sentences of a test set.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from moesaic.core.errors import DataError
from moesaic.evaluate.bootstrap import (
    BootstrapScores,
    ScoreDifference,
    bootstrap_resample,
    macro_average,
)
from moesaic.evaluate.evaluation_summary import (
    EvaluationSummary,
    SampleTranslation,
    SystemResult,
    TestSetResult,
)
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
    """How much to measure. ``samples`` sentences per language are kept in the summary."""

    resamples: int = 1000
    seed: int = 0
    samples: int = 5


TraceSample = Callable[[TestSet, SampleTranslation], dict[str, Any] | None]


def evaluate(
    systems: Mapping[str, TranslationSystem],
    *,
    tests: Sequence[TestSet],
    settings: EvaluationSettings | None = None,
    on_result: Callable[[TestSet, TestSetResult], None] = lambda *_: None,
) -> EvaluationSummary:
    """Run every system on every test set and score them.

    The first system is the one under test: differences are its lead over each of the others, paired
    over the same resamples. ``done`` is called after each test set, for progress. Raises DataError
    when there is nothing to test or two test sets go under one key.
    """
    settings = settings or EvaluationSettings()
    _check_inputs(systems, tests)
    identify = load_language_identifier(
        sorted({t.target for t in tests} | {t.source for t in tests})
    )
    extra = load_spbleu()
    languages: dict[str, TestSetResult] = {}
    drawn: dict[str, list[dict[str, BootstrapScores]]] = {name: [] for name in systems}
    for number, test in enumerate(tests):
        metrics: list[CorpusMetric] = [ChrF(), bleu_for_language(test.target)]
        metrics += [extra] if not isinstance(extra, str) else []
        judge = _TestSetScorer(
            test,
            metrics,
            replace(settings, seed=settings.seed + number),
            _identifier_or_none(identify),
        )
        languages[test.key] = result = judge.score_systems(systems)
        for name in systems:
            drawn[name].append(judge.resampled[name])
        on_result(test, result)
    names = list(next(iter(languages.values())).signatures)
    means = {
        name: {m: macro_average([d[m] for d in rows]) for m in names}
        for name, rows in drawn.items()
    }
    first, *others = systems
    notes = [f"spBLEU {extra}"] if isinstance(extra, str) else []
    notes += [f"off-target by identification {identify}"] if isinstance(identify, str) else []
    return EvaluationSummary(
        systems=tuple(systems),
        languages=languages,
        mean={
            s: {m: x.confidence_interval() for m, x in found.items()} for s, found in means.items()
        },
        mean_differences={
            other: _score_differences(means[first], means[other]) for other in others
        },
        notes=tuple(notes),
    )


def add_expert_traces(summary: EvaluationSummary, *, trace: TraceSample) -> EvaluationSummary:
    """Return a copy with ``trace(test, sample)`` beside each sample: which experts spoke."""
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
        self.resampled: dict[str, dict[str, BootstrapScores]] = {}

    def score_systems(self, systems: Mapping[str, TranslationSystem]) -> TestSetResult:
        test = self._test
        outputs: dict[str, list[str]] = {}
        results: dict[str, SystemResult] = {}
        for name, translate in systems.items():
            began = time.perf_counter()
            said = translate(list(test.sources), source=test.source, target=test.target)
            seconds = time.perf_counter() - began
            if len(said) != len(test):
                raise ValueError(f"{name} gave {len(said)} outputs for {len(test)} sentences")
            outputs[name] = said
            results[name] = self._score(name, said, seconds=seconds)
        first, *others = systems
        return TestSetResult(
            test,
            {metric.name: metric.signature for metric in self._metrics},
            results,
            {
                other: _score_differences(self.resampled[first], self.resampled[other])
                for other in others
            },
            self._samples(outputs),
        )

    def _score(self, name: str, said: list[str], *, seconds: float) -> SystemResult:
        self.resampled[name] = {
            metric.name: bootstrap_resample(
                metric,
                statistics=metric.sentence_statistics(said, references=self._test.references),
                resamples=self._settings.resamples,
                seed=self._settings.seed,
            )
            for metric in self._metrics
        }
        off = measure_off_target(
            said,
            references=self._test.references,
            target=self._test.target,
            identify=self._identify,
        )
        scores = {
            metric: drawn.confidence_interval() for metric, drawn in self.resampled[name].items()
        }
        return SystemResult(scores, off, sum(not text.strip() for text in said), seconds)

    def _samples(self, outputs: Mapping[str, list[str]]) -> tuple[SampleTranslation, ...]:
        """Evenly spaced through the test set: not chosen by how good they are."""
        count = min(self._settings.samples, len(self._test))
        chosen = [(2 * i + 1) * len(self._test) // (2 * count) for i in range(count)]
        return tuple(
            SampleTranslation(
                self._test.sources[i],
                self._test.references[i],
                {name: said[i] for name, said in outputs.items()},
            )
            for i in chosen
        )


def _score_differences(
    ours: Mapping[str, BootstrapScores], theirs: Mapping[str, BootstrapScores]
) -> dict[str, ScoreDifference]:
    return {name: ours[name].compare(theirs[name]) for name in ours}


def _identifier_or_none(identify: LanguageIdentifier | str) -> LanguageIdentifier | None:
    return None if isinstance(identify, str) else identify


def _check_inputs(systems: Mapping[str, TranslationSystem], tests: Sequence[TestSet]) -> None:
    if not systems:
        raise ValueError("evaluate needs at least one system")
    if not tests:
        raise DataError("nothing to evaluate: no test set was given")
    keys = [test.key for test in tests]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise DataError(f"two test sets for {', '.join(twice)}: evaluate them one after the other")
