"""``moesaic translate``: translate lines of text, one translation per line, in order."""

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    Result,
    RoutesOption,
    RunArgument,
    UseOption,
    command_app,
    print_table,
    show_progress,
    stderr,
)
from moesaic.cli.styled_text import cyan, styled
from moesaic.cli.user_files import import_user_files

with deferred():
    from moesaic.checkpoint.routes_file import RoutesWriter
    from moesaic.checkpoint.run_directory import RunDir
    from moesaic.core.errors import UserError
    from moesaic.model.beam_search import Beam, Greedy, Search
    from moesaic.serve.imported_generation import read_imported_generation
    from moesaic.serve.translation_input import read_lines_to_translate, read_stream_to_translate
    from moesaic.serve.translation_result import TranslationResult, describe_results
    from moesaic.serve.translation_routing import translation_routes
    from moesaic.serve.translator import Translator

app = command_app()
_DEFAULT_BEAM = 4


FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="Lines to translate (default: standard input)."),
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--from", help="Source language, any spelling (default: English, or the only one trained)."
    ),
]
TargetOption = Annotated[str, typer.Option("--to", help="Target language, any spelling.")]
BeamOption = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Beam size; 1 is greedy (4, or --n-best if larger)."),
]
LengthPenaltyOption = Annotated[
    float | None,
    typer.Option(min=0, help="Scores are divided by length to this power (default: 1)."),
]
NBestOption = Annotated[int, typer.Option(min=1, max=1024, help="Translations of each line.")]
NoRepeatOption = Annotated[
    int | None,
    typer.Option(min=0, help="Generate no n-gram of so many tokens twice in a line (0: off)."),
]
RepetitionOption = Annotated[
    float | None,
    typer.Option(help="Above 1, tokens already generated are less likely (1: off)."),
]
EarlyStoppingOption = Annotated[
    str | None,
    typer.Option(metavar="true|false|never", help="When a beam search stops (see the guide)."),
]
AsTextOption = Annotated[
    bool, typer.Option("--as-text", help="Translate the lines of a .po, .json, .srt, ... file too.")
]
ExpertsOption = Annotated[bool, typer.Option("--experts", help="Show the experts of each token.")]


@app.command()
def translate(
    run: RunArgument,
    file: FileArgument = None,
    *,
    source: SourceOption = None,
    target: TargetOption,
    beam: BeamOption = None,
    length_penalty: LengthPenaltyOption = None,
    n_best: NBestOption = 1,
    no_repeat_ngram: NoRepeatOption = None,
    repetition_penalty: RepetitionOption = None,
    early_stopping: EarlyStoppingOption = None,
    as_text: AsTextOption = False,
    experts: ExpertsOption = False,
    routes: RoutesOption = None,
    files: UseOption = None,
) -> Result:
    """Translate lines to stdout, in the order of the input; empty lines stay empty.

    An imported model has the defaults of its generation_config.json.

    Example: [cyan]echo "Save changes" | moesaic translate runs/demo --to es[/]
    """
    search = _make_search(
        read_imported_generation(RunDir(run).imported).translation,
        size=beam,
        n_best=n_best,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        no_repeat_ngram_size=no_repeat_ngram,
        repetition_penalty=repetition_penalty,
    )
    given = None if file is None else read_lines_to_translate(file, as_text=as_text)
    import_user_files(files)
    translator = Translator.open(run)
    _require_translation(translator, run)
    source = source or translator.default_source(target)
    notes = translator.direction_warnings(source, target)
    _show_notes(notes)  # before anything is typed or waited for
    lines = _standard_input(as_text=as_text) if given is None else given
    done = translator.translate(lines, source=source, target=target, search=search)
    about_lines = list(describe_results(done))
    if (experts or routes) and any(t.parts > 1 for t in done):
        about_lines.append("experts are those of the beginning of lines translated in parts")
    _show_notes(about_lines)
    rows = [asdict(t) for t in done]
    if routes is not None:
        _write_routes(routes, translator, lines, done=done, direction=(source, target), run=run)
    if experts:
        traces = [
            translator.trace_experts(line, translation=t.text, source=source, target=target)
            for line, t in zip(lines, done, strict=True)
        ]
        rows = [row | {"experts": trace} for row, trace in zip(rows, traces, strict=True)]
    return Result(
        {"translations": rows, "notes": [*notes, *about_lines]},
        lambda console: _show(done, rows, console),
    )


def _write_routes(
    path: Path,
    translator: Translator,
    lines: Sequence[str],
    *,
    done: Sequence[TranslationResult],
    direction: tuple[str, str],
    run: Path,
) -> None:
    about = {"run": run.resolve().name}
    with RoutesWriter(path, languages=translator.languages, about=about) as writer:
        for found in translation_routes(
            translator,
            lines,
            translations=[t.text for t in done],
            source=direction[0],
            target=direction[1],
        ):
            writer.add(found)


def _require_translation(translator: Translator, run: Path) -> None:
    trained = translator.trained
    if not translator.model.config.encoder.layers and trained and not trained.directions:
        raise UserError(
            f"{run} is a language model: it was trained on texts alone, and continues them "
            f'(`moesaic generate {run} "..."`)'
        )


def _make_search(
    usual: Mapping[str, Any], *, n_best: int, early_stopping: str | None, **options: Any
) -> Search:
    """Return the search that the options ask for, or the ``usual`` settings of the model.

    Raises UserError where options contradict.
    """
    settings = {"size": _DEFAULT_BEAM, **usual, "n_best": n_best}
    settings["size"] = max(settings["size"], n_best)
    settings |= {name: value for name, value in options.items() if value is not None}
    size = settings["size"]
    if n_best > size:
        raise UserError(
            f"--n-best {n_best} needs a beam of at least {n_best}, found --beam {size}: raise it, "
            "or leave it out"
        )
    rules = {"true": True, "false": False, "never": "never"}
    if early_stopping is not None:
        if early_stopping.casefold() not in rules:
            raise UserError(f'--early-stopping "{early_stopping}": expected true, false or never')
        settings["early_stopping"] = rules[early_stopping.casefold()]
    if size == 1:
        return Greedy(**{key: settings[key] for key in Greedy.model_fields.keys() & settings})
    return Beam.from_dict(settings)


def _standard_input(*, as_text: bool) -> list[str]:
    if sys.stdin.isatty():
        show_progress("one text per line; end with Ctrl-D")
    if isinstance(sys.stdin, io.TextIOWrapper):
        stream = sys.stdin.buffer
    else:  # a replacement without bytes, such as that of a notebook or a test
        stream = io.BytesIO(sys.stdin.read().encode("utf-8", "replace"))
    return read_stream_to_translate(stream, name="standard input", as_text=as_text)


def _show_notes(notes: Sequence[str]) -> None:
    for note in notes:
        stderr.print(styled("[yellow]note:[/] {note}", note=note))


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
        rows.append((styled("[dim]{layer}[/]", layer=layer), *map(cyan, used)))
    print_table(console, ("",) * len(rows[0]), rows, align="l" * len(rows[0]))
