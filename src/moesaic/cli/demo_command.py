"""``moesaic demo``: build a corpus, train, score and report, in about ten minutes."""

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, SetOption, command_app, show_progress, stderr
from moesaic.cli.styled_text import styled

with deferred():
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.cli.eval_command import write_evaluation
    from moesaic.cli.evaluated_run import EvaluatedRun
    from moesaic.cli.score_output import show_samples, show_scores
    from moesaic.cli.score_progress import ScoreProgress
    from moesaic.core.errors import DataError
    from moesaic.core.units import show_seconds
    from moesaic.corpus.corpus import Corpus
    from moesaic.corpus.join_pairs import pairs_of_direction
    from moesaic.corpus.languages import ENGLISH
    from moesaic.evaluate.evaluation_summary import EvaluationSummary
    from moesaic.evaluate.testset import TestSet
    from moesaic.model.parameter_flop_count import count_parameters
    from moesaic.recipes.lookup import find_recipe
    from moesaic.report.html_report import write_report
    from moesaic.serve.score import score_run
    from moesaic.serve.translator import Translator
    from moesaic.train.find_corpus import FoundCorpus
    from moesaic.train.resume import ResumeLatest
    from moesaic.train.run import Run
    from moesaic.train.run_training import train
    from moesaic.train.text_data import require_text

app = command_app()
COMMON_STRINGS = ("Save", "Delete", "Search results", "Enter your password", "Page not found")


class PhaseTimer:
    """Measures the seconds of each phase and prints its title."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def start(self, title: str) -> None:
        rule = Rule(Text(title, style="bold"), align="left")
        stderr.print(rule, width=min(stderr.width, 100))
        self._started = time.monotonic()

    def end(self, name: str) -> None:
        self.seconds[name] = time.monotonic() - self._started


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    recipe: Annotated[str, typer.Option(help="Which recipe.")] = "demo",
    changes: SetOption = None,
) -> Result:
    """Build a corpus, train a small multilingual MoE on it, score it, write a report.

    An interrupted demo continues when it is started again.

    Example: [cyan]moesaic demo --out runs/demo[/]
    """
    run, phases = find_recipe(recipe, changes=changes or []), PhaseTimer()
    phases.start("1/4  data: translations from software packages")
    corpus = require_text(run.data, what="moesaic demo").corpus.open()
    show_progress(
        f"{corpus.name}: {corpus.manifest['pairs']:,} pairs, {len(corpus.languages)} languages"
    )
    phases.end("data")
    phases.start("2/4  training: translation and denoising")
    result = train(run, out, resume=ResumeLatest())
    phases.end("train")
    if result.exit_code:
        stderr.print("stopped; the same command continues the run")
        raise typer.Exit(result.exit_code)
    phases.start("3/4  scores: held-out strings")
    try:
        chosen = EvaluatedRun.open(out).held_out_tests(FoundCorpus(corpus))
    except DataError as error:  # e.g. a language model: there is nothing to translate
        return _finish_without_scores(out, reason=str(error))
    summary = score_run(
        out,
        tests=chosen.tests,
        corpus=corpus,
        on_result=ScoreProgress(chosen.tests),
    ).with_notes(chosen.notes)
    phases.end("evaluate")
    summary = summary.with_run_facts(
        counts=run_counts(run, steps=result.steps, tokens=result.tokens), seconds=phases.seconds
    )
    phases.start("4/4  report")
    report = write_evaluation(out, summary=summary, tests=chosen.tests)
    phases.end("report")
    value = summary.to_dict() | {"report": str(report), "run_directory": str(out)}
    return Result(
        value,
        lambda console: _show(out, corpus=corpus, summary=summary, phases=phases, console=console),
    )


def run_counts(run: Run, *, steps: int, tokens: int) -> dict[str, int]:
    """Return the counts for summary.json and the report."""
    model = count_parameters(run.model)
    return {
        "parameters": model.total,
        "active_parameters": model.active,
        "steps": steps,
        "train_tokens": tokens,
    }


def _finish_without_scores(out: Path, *, reason: str) -> Result:
    """Write the report of a run that cannot be scored, and say why."""
    report = write_report(out)
    value = {"report": str(report), "run_directory": str(out), "not_scored": reason}
    text = f"not scored: {reason}\nreport:     {report}"
    return Result(value, lambda console: console.print(text))


def _show(
    out: Path, *, corpus: Corpus, summary: EvaluationSummary, phases: PhaseTimer, console: Console
) -> None:
    show_scores(summary, console)
    show_samples(summary, console, each=1)
    tests = [result.test for result in summary.languages.values()]
    english = [test for test in tests if test.source == ENGLISH]
    if english:
        _show_common_strings(out, corpus=corpus, tests=english, console=console)
    spent = ", ".join(f"{name} {show_seconds(s)}" for name, s in phases.seconds.items())
    console.print(styled("\n[dim]time: {spent}[/]", spent=spent))
    folder, first = RunDir(out), (english or tests)[0]
    text = shlex.quote(COMMON_STRINGS[0] if english else first.sources[0])
    ends = f"--from {first.source} --to {first.target}"
    console.print(f"report:     {folder.report}")
    console.print(f"translate:  echo {text} | moesaic translate {shlex.quote(str(out))} {ends}")
    console.print(f"everything: {folder.path}/ (config, weights, tokenizer, metrics, card)")


def _show_common_strings(
    out: Path, *, corpus: Corpus, tests: list[TestSet], console: Console
) -> None:
    console.print(styled("\n[bold]common strings[/] [dim](* in the training data)[/]"))
    translator = Translator.open(out)
    for test in tests:
        outputs = translator.translate_texts(
            list(COMMON_STRINGS), source=test.source, target=test.target
        )
        rows = pairs_of_direction(corpus, test.source, test.target, split="train")
        trained = {pair.source for pair in rows}
        pairs = Text(" · ").join(
            styled("[dim]{a}{star}[/] {b}", a=a, star="*" if a in trained else "", b=b)
            for a, b in zip(COMMON_STRINGS, outputs, strict=True)
        )
        console.print(styled("  [dim]{target}[/]  {pairs}", target=test.target, pairs=pairs))
