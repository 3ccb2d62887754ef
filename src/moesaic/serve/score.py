"""Score a run against copying and a translation memory, on held-out text or a test set."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.files import write_json
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.join_pairs import can_be_read, pairs_of_direction
from moesaic.evaluate.baselines import TranslationMemorySystem, copy_source
from moesaic.evaluate.evaluation_summary import EvaluationSummary
from moesaic.evaluate.harness import (
    EvaluationSettings,
    TranslationSystem,
    add_expert_traces,
    evaluate,
)
from moesaic.evaluate.routing_analysis import RoutingAnalysis
from moesaic.evaluate.seen_rows import SeenRows, find_seen_rows
from moesaic.evaluate.test_set_result import SampleTranslation, TestSetResult
from moesaic.evaluate.testset import TestSet
from moesaic.model.beam_search import Search
from moesaic.monitor.expert_usage import UsageCounter
from moesaic.serve.translation_result import TranslationResult
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

    The memory contains the train rows of ``corpus``, among which the test rows are looked up too;
    without a corpus there is neither. ``search`` is that of the run, unless given (an imported
    model may have come with one). Writes no files: see ``EvaluationSummary.write`` and
    ``count_experts``.
    """
    started = time.monotonic()
    translator = Translator.open(path)
    model = ObservedModel(translator, search or translator.search)
    systems: dict[str, TranslationSystem] = {"model": model, "copy": copy_source}
    seen: dict[str, SeenRows] = {}
    if corpus is not None:
        if any(next(train_pairs(corpus, *test.direction), None) for test in tests):
            systems["memory"] = TranslationMemorySystem(partial(train_pairs, corpus))
        seen = {t.key: find_seen_rows(t, train_pairs(corpus, *t.direction)) for t in tests}
    summary = evaluate(systems, tests=tests, settings=settings, seen=seen, on_result=on_result)
    summary = add_expert_traces(summary, trace=partial(_trace_sample, translator))
    notes = [*_seen_notes(summary, seen), *model.notes()]
    return summary.with_notes(notes).with_run_facts(
        run=Path(path).name,
        counts={"sentences": sum(len(test) for test in tests)} | model.counts(),
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


class ObservedModel:
    """The model as a system of an evaluation; counts cut answers and split sources."""

    def __init__(self, translator: Translator, search: Search) -> None:
        self._translator, self._search = translator, search
        self._found: dict[str, list[TranslationResult]] = {}

    def __call__(self, texts: list[str], *, source: str, target: str) -> list[str]:
        results = self._translator.translate(
            texts, source=source, target=target, search=self._search
        )
        self._found[f"{source}-{target}"] = results
        return [result.text for result in results]

    def counts(self) -> dict[str, int]:
        """Return the counts for summary.json."""
        results = [result for found in self._found.values() for result in found]
        return {
            "cut_answers": sum(not result.finished for result in results),
            "split_sources": sum(result.parts > 1 for result in results),
        }

    def notes(self) -> Iterator[str]:
        """Yield a note on answers that were cut, and one on split sources, by language."""
        limits = self._translator.limits
        total = sum(map(len, self._found.values()))
        cut = {name: sum(not r.finished for r in rows) for name, rows in self._found.items()}
        if any(cut.values()):
            yield (
                f"{sum(cut.values())} of {total} answers were cut at the length limit (at most "
                f"{limits.max_target} tokens, and {limits.max_length_ratio:g} times the source); "
                f"they are scored as they are: {_list_counts(cut)}"
            )
        split = {name: sum(r.parts > 1 for r in rows) for name, rows in self._found.items()}
        if any(split.values()):
            yield (
                f"{sum(split.values())} of {total} sources are longer than the model's limit "
                f"({limits.max_source} tokens) and were translated in parts: {_list_counts(split)}"
            )


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _seen_notes(summary: EvaluationSummary, seen: Mapping[str, SeenRows]) -> Iterator[str]:
    """Note how many rows were trained on, with the scores of these and of the others."""
    for key, found in seen.items():
        result = summary.languages[key]
        sentence, group = found.sentence(result.test), result.groups.get("seen")
        if not sentence or group is None:
            continue
        parts = [f"on these {_both_scores(group.inside['model'])}"]
        if group.outside:
            parts.append(f"on the other {group.rest} {_both_scores(group.outside['model'])}")
        yield f"{sentence}; the model has {', '.join(parts)}"


def _both_scores(scores: Mapping[str, float]) -> str:
    return f"{scores['chrf']:.1f} chrF++ and {scores['bleu']:.1f} BLEU"


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
