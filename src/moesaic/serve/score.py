"""Score: a run against its honest baselines, on held-out strings or on a test set of your own."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.files import write_json
from moesaic.corpus.corpus import Corpus
from moesaic.evaluate.baselines import TranslationMemorySystem, copy_source
from moesaic.evaluate.evaluation_summary import EvaluationSummary, SampleTranslation, TestSetResult
from moesaic.evaluate.harness import (
    EvaluationSettings,
    TranslationSystem,
    add_expert_traces,
    evaluate,
)
from moesaic.evaluate.routing_analysis import RoutingAnalysis
from moesaic.evaluate.testset import TestSet
from moesaic.model.generate import Greedy, Search
from moesaic.moe.routing_record import LayerRoutes
from moesaic.monitor.expert_usage import UsageCounter
from moesaic.serve.translation_routing import translation_routes
from moesaic.serve.translator import Translator

OnResult = Callable[[TestSet, TestSetResult], None]
BatchRouting = tuple[LayerRoutes, ...]


def score_run(
    path: Path | str,
    *,
    tests: Sequence[TestSet],
    corpus: Corpus | None = None,
    search: Search | None = None,
    settings: EvaluationSettings | None = None,
    on_result: OnResult = lambda *_: None,
) -> EvaluationSummary:
    """Translate ``tests`` with a run and score it beside copying and a translation memory.

    The memory holds the train rows of ``corpus``; without one it is left out. Writes nothing: see
    ``EvaluationSummary.write`` and ``count_experts``.
    """
    began = time.monotonic()
    translator = Translator.open(path)
    model: TranslationSystem = partial(translator.translate_texts, search=search or Greedy())
    systems: dict[str, TranslationSystem] = {"model": model, "copy": copy_source}
    if corpus is not None:
        systems["memory"] = TranslationMemorySystem(partial(train_pairs, corpus))
    summary = evaluate(systems, tests=tests, settings=settings, on_result=on_result)
    summary = add_expert_traces(summary, trace=partial(_trace_sample, translator))
    summary = replace(summary, notes=(*summary.notes, *_truncation_notes(translator, tests)))
    return summary.with_run_facts(
        run=Path(path).name,
        counts={"sentences": sum(len(test) for test in tests)},
        seconds={"evaluate": time.monotonic() - began},
    )


def count_experts(
    path: Path | str, *, tests: Sequence[TestSet], routes: Path | None = None
) -> UsageCounter:
    """Count which experts read and write the test sentences, by target language.

    Writes the run's ``usage.json`` and ``insight.json``, and every edge to ``routes`` if given.
    Returns the counts.
    """
    run, translator = RunDir(Path(path)), Translator.open(path)
    analysis = RoutingAnalysis(translator.languages)
    with _routing_recorder(routes, translator=translator, tests=tests) as record:
        for batch in _test_routing(translator, tests):
            analysis.add(record(batch))
    analysis.usage.write(run.usage)
    if analysis.usage.layers():
        write_json(run.insight, analysis.to_dict(show=translator.token_text))
    return analysis.usage


def _truncation_notes(translator: Translator, tests: Sequence[TestSet]) -> Iterator[str]:
    """A score over texts that the model saw only the beginning of must say so."""
    counts = [
        translator.count_truncated(test.sources, source=test.source, target=test.target)
        for test in tests
    ]
    if sum(counts):
        yield (
            f"{sum(counts)} of {sum(map(len, tests))} sources are longer than the model reads "
            f"({translator.limits.max_source} tokens): it saw their beginning alone"
        )


def record_routing(path: Path | str, *, tests: Sequence[TestSet], out: Path) -> None:
    """Write the experts of every token of the test sentences to the routes file ``out``."""
    translator = Translator.open(path)
    with _routing_recorder(out, translator=translator, tests=tests) as record:
        for found in _test_routing(translator, tests):
            record(found)


@contextmanager
def _routing_recorder(
    path: Path | None, *, translator: Translator, tests: Sequence[TestSet]
) -> Iterator[Callable[[BatchRouting], BatchRouting]]:
    """Give a function that hands routes on, writing them to a file where one was asked for."""
    if path is None:
        yield lambda routes: routes
        return
    about = {"texts": sorted({test.name for test in tests})}
    with RoutesWriter(path, languages=translator.languages, about=about) as writer:

        def record(routes: BatchRouting) -> BatchRouting:
            writer.add(routes)
            return routes

        yield record


def _test_routing(translator: Translator, tests: Sequence[TestSet]) -> Iterator[BatchRouting]:
    for test in tests:
        yield from translation_routes(
            translator,
            test.sources,
            translations=test.references,
            source=test.source,
            target=test.target,
        )


def train_pairs(corpus: Corpus, source: str, target: str) -> Iterator[tuple[str, str]]:
    """Yield what a translation memory may know: the train rows of a direction."""
    for pair in corpus.iter_pairs(source, target, split="train"):
        yield pair.source, pair.target


def _trace_sample(
    translator: Translator, test: TestSet, sample: SampleTranslation
) -> dict[str, Any]:
    trace = translator.trace_experts(
        sample.source,
        translation=sample.outputs["model"],
        source=test.source,
        target=test.target,
    )
    return trace.plain()
