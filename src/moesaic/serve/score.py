"""Score: a run against its honest baselines, on held-out strings or on a test set of your own."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.checkpoint.rundir import RunDir
from moesaic.data.batch import Batch
from moesaic.data.corpus import Corpus
from moesaic.evaluate.baselines import MemorySystem, copy_source
from moesaic.evaluate.experts import expert_usage
from moesaic.evaluate.harness import Settings, Translate, evaluate, traced
from moesaic.evaluate.summary import LanguageResult, Sample, Summary
from moesaic.evaluate.testset import TestSet
from moesaic.model.search import Greedy, Search
from moesaic.observe.routes import RouteCounts
from moesaic.serve.translator import Translator

Done = Callable[[TestSet, LanguageResult], None]
_CHUNK = 256  # sentences read at a time when experts are counted


def score_run(
    path: Path | str,
    *,
    tests: Sequence[TestSet],
    corpus: Corpus | None = None,
    search: Search | None = None,
    settings: Settings | None = None,
    done: Done = lambda *_: None,
) -> Summary:
    """Translate ``tests`` with a run and score it beside copying and a translation memory.

    The memory holds the train rows of ``corpus``; without one it is left out. Writes nothing: see
    ``Summary.write`` and ``count_experts``.
    """
    began = time.monotonic()
    translator = Translator.open(path)
    model: Translate = partial(translator.texts, search=search or Greedy())
    systems: dict[str, Translate] = {"model": model, "copy": copy_source}
    if corpus is not None:
        systems["memory"] = MemorySystem(partial(train_pairs, corpus))
    summary = evaluate(systems, tests=tests, settings=settings, done=done)
    summary = traced(summary, trace=partial(_experts, translator))
    summary = replace(summary, notes=(*summary.notes, *_cut(translator, tests)))
    return summary.add(
        run=Path(path).name,
        counts={"sentences": sum(len(test) for test in tests)},
        seconds={"evaluate": time.monotonic() - began},
    )


def count_experts(path: Path | str, *, tests: Sequence[TestSet]) -> RouteCounts:
    """Count which experts read and write the test sentences, by target language.

    Writes the run's ``routes.json`` and returns the counts.
    """
    translator = Translator.open(path)
    counts = expert_usage(
        translator.model, batches=_batches(translator, tests), languages=translator.languages
    )
    counts.write(RunDir(Path(path)).routes)
    return counts


def _cut(translator: Translator, tests: Sequence[TestSet]) -> Iterator[str]:
    """A score over texts that the model saw only the beginning of must say so."""
    counts = [
        translator.count_cut(test.sources, source=test.source, target=test.target) for test in tests
    ]
    if sum(counts):
        yield (
            f"{sum(counts)} of {sum(map(len, tests))} sources are longer than the model reads "
            f"({translator.limits.max_source} tokens): it saw their beginning alone"
        )


def _batches(translator: Translator, tests: Sequence[TestSet]) -> Iterator[Batch]:
    for test in tests:
        for start in range(0, len(test), _CHUNK):
            part = slice(start, start + _CHUNK)
            yield translator.batch(
                test.sources[part],
                targets=test.references[part],
                source=test.source,
                target=test.target,
            )


def train_pairs(corpus: Corpus, source: str, target: str) -> Iterator[tuple[str, str]]:
    """Yield what a translation memory may know: the train rows of a direction."""
    for pair in corpus.iter_pairs(source, target, split="train"):
        yield pair.source, pair.target


def _experts(translator: Translator, test: TestSet, sample: Sample) -> dict[str, Any]:
    trace = translator.experts(
        sample.source,
        translation=sample.outputs["model"],
        source=test.source,
        target=test.target,
    )
    return trace.plain()
