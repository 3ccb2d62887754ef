"""``moesaic translate``: translate lines of text, one translation per line, in order."""

import sys
from dataclasses import asdict
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
    stderr,
)
from moesaic.cli.styled_text import styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.checkpoint.routes_file import RoutesWriter
    from moesaic.core.errors import DataError, UserError
    from moesaic.corpus.readers.text_lines import read_lines
    from moesaic.model.beam_search import Beam, Greedy, Search
    from moesaic.serve.translation_routing import translation_routes
    from moesaic.serve.translator import TranslationResult, Translator

app = command_app()


@app.command()
def translate(
    run: RunArgument,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Lines to translate (default: standard input)."),
    ] = None,
    *,
    source: Annotated[str, typer.Option("--from", help="Source language, any spelling.")] = "en",
    target: Annotated[str, typer.Option("--to", help="Target language, any spelling.")],
    beam: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Beam size (4); 1 is greedy.")
    ] = None,
    length_penalty: Annotated[
        float, typer.Option(help="Scores are divided by length to this power.")
    ] = 1.0,
    n_best: Annotated[int, typer.Option(min=1, max=1024, help="Translations of each line.")] = 1,
    experts: Annotated[
        bool, typer.Option("--experts", help="Show the experts of each token.")
    ] = False,
    routes: RoutesOption = None,
    files: UseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Translate lines to stdout, in the order of the input; empty lines stay empty.

    Example: [cyan]echo "Save changes" | moesaic translate runs/demo --to es[/]
    """
    import_user_files(files)
    translator = Translator.open(run)
    search = _search(beam, length_penalty=length_penalty, n_best=n_best)
    lines = _lines(file)
    done = translator.translate(lines, source=source, target=target, search=search)
    cut = sum(t.truncated for t in done)
    if cut:
        stderr.print(
            f"{cut} line(s) were longer than the model's limit and were truncated", style="yellow"
        )
    rows = [asdict(t) for t in done]
    if routes is not None:
        outputs = [t.text for t in done]
        with RoutesWriter(
            routes, languages=translator.languages, about={"run": run.resolve().name}
        ) as writer:
            for found in translation_routes(
                translator, lines, translations=outputs, source=source, target=target
            ):
                writer.add(found)
    if experts:
        traces = [
            translator.trace_experts(line, translation=t.text, source=source, target=target)
            for line, t in zip(lines, done, strict=True)
        ]
        rows = [row | {"experts": trace} for row, trace in zip(rows, traces, strict=True)]
    print_result(
        {"translations": rows}, as_json=as_json, show=lambda console: _show(done, rows, console)
    )


def _search(beam: int | None, *, length_penalty: float, n_best: int) -> Search:
    if beam is not None and beam < n_best:
        raise UserError(
            f"--n-best {n_best}: a beam of {beam} finds at most {beam}; "
            f"widen it with --beam {n_best}"
        )
    beam = beam or 4
    if beam == 1 and n_best == 1:
        return Greedy()
    return Beam(size=max(beam, n_best), length_penalty=length_penalty, n_best=n_best)


def _lines(file: Path | None) -> list[str]:
    if file is not None:
        return [line for _, line in read_lines(file)]
    if sys.stdin.isatty():
        show_progress("one text per line; end with Ctrl-D")
    try:
        return sys.stdin.read().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error}") from error


def _show(done: list[TranslationResult], rows: list[dict[str, Any]], console: Console) -> None:
    for translation, row in zip(done, rows, strict=True):
        sys.stdout.write(translation.text + "\n")
        if len(translation.alternatives) > 1:
            for other in translation.alternatives:
                console.print(
                    styled("  [dim]{score:7.3f}[/]  {text}", score=other.score, text=other.text)
                )
        for side in row.get("experts", {}).values():
            _show_side(side, console)


def _show_side(side: dict[str, Any], console: Console) -> None:
    """Print a row of tokens, then a row of experts for each MoE layer."""
    rows: list[tuple[str | Text, ...]] = [
        ("", *(styled("[bold]{token}[/]", token=token) for token in side["tokens"]))
    ]
    for layer, routed in side["layers"].items():
        used = ("+".join(str(expert) for expert, _ in pairs) or "-" for pairs in routed)
        rows.append(
            (
                styled("[dim]{layer}[/]", layer=layer),
                *(styled("[cyan]{experts}[/]", experts=experts) for experts in used),
            )
        )
    print_table(console, ("",) * len(rows[0]), rows, align="l" * len(rows[0]))
