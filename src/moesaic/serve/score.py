"""Score a run against copying and a translation memory, on held-out text or a test set."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.files import write_json
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.join_pairs import can_be_read, pairs_of_direction
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
from moesaic.model.beam_search import Greedy, Search
from moesaic.monitor.expert_usage import UsageCounter
from moesaic.serve.translation_routing import test_set_routing
from moesaic.serve.translator import Translator

OnResult = Callable[[TestSet, TestSetResult], None]


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

    The memory contains the train rows of ``corpus``; without a corpus there is none. Writes no
    files: see ``EvaluationSummary.write`` and ``count_experts``.
    """
    started = time.monotonic()
    translator = Translator.open(path)
    model: TranslationSystem = partial(translator.translate_texts, search=search or Greedy())
    systems: dict[str, TranslationSystem] = {"model": model, "copy": copy_source}
    if corpus is not None:
        systems["memory"] = TranslationMemorySystem(partial(train_pairs, corpus))
    summary = evaluate(systems, tests=tests, settings=settings, on_result=on_result)
    summary = add_expert_traces(summary, trace=partial(_trace_sample, translator))
    summary = replace(summary, notes=(*_truncation_notes(translator, tests), *summary.notes))
    return summary.with_run_facts(
        run=Path(path).name,
        counts={"sentences": sum(len(test) for test in tests)},
        seconds={"evaluate": time.monotonic() - started},
    )


def count_experts(
    path: Path | str, *, tests: Sequence[TestSet], routes: Path | None = None
) -> UsageCounter:
    """Count the experts of the test sentences by target language.

    Writes the run's ``usage.json`` and ``insight.json``, and the routing to ``routes`` if given.
    """
    run, translator = RunDir(Path(path)), Translator.open(path)
    analysis = RoutingAnalysis(translator.languages)
    with ExitStack() as stack:
        writer = stack.enter_context(_routes_writer(routes, translator, tests)) if routes else None
        for batch in test_set_routing(translator, tests):
            analysis.add(batch)
            if writer is not None:
                writer.add(batch)
    analysis.usage.write(run.usage)
    if analysis.usage.layers():
        write_json(run.insight, analysis.to_dict(show=translator.token_text))
    return analysis.usage


def record_routing(path: Path | str, *, tests: Sequence[TestSet], out: Path) -> None:
    """Write the experts of every token of the test sentences to the routes file ``out``."""
    translator = Translator.open(path)
    with _routes_writer(out, translator, tests) as writer:
        for batch in test_set_routing(translator, tests):
            writer.add(batch)


def _routes_writer(path: Path, translator: Translator, tests: Sequence[TestSet]) -> RoutesWriter:
    about = {"texts": sorted({test.name for test in tests})}
    return RoutesWriter(path, languages=translator.languages, about=about)


def _truncation_notes(translator: Translator, tests: Sequence[TestSet]) -> Iterator[str]:
    """Note how many sources were truncated before translation."""
    counts = [
        translator.count_truncated(test.sources, source=test.source, target=test.target)
        for test in tests
    ]
    if sum(counts):
        yield (
            f"{sum(counts)} of {sum(map(len, tests))} sources are longer than the model's limit "
            f"({translator.limits.max_source} tokens) and were truncated"
        )


def train_pairs(corpus: Corpus, source: str, target: str) -> Iterator[tuple[str, str]]:
    """Yield the train rows of a direction, for a translation memory."""
    if can_be_read(corpus, source, target):
        for pair in pairs_of_direction(corpus, source, target, split="train"):
            yield pair.source, pair.target


def _trace_sample(
    translator: Translator, test: TestSet, sample: SampleTranslation
) -> dict[str, Any]:
    return translator.trace_experts(
        sample.source,
        translation=sample.outputs["model"],
        source=test.source,
        target=test.target,
    )
