"""Options and output shared by all commands: results on stdout, progress on stderr."""

import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesaic.cli.deferred_imports import finish_imports
from moesaic.cli.standard_streams import named_stdout
from moesaic.cli.styled_text import styled, visible
from moesaic.core.version import __version__

JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change one config key; may be repeated."),
]
UseOption = Annotated[
    list[Path] | None,
    typer.Option("--use", metavar="FILE.py", help="Load your own routers, tasks, ... first."),
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/demo.")
]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE|CONFIG", help="A recipe, a config.yaml or a run.")
]
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE|CONFIG|PRESET", help="Recipe, config.yaml, run or preset."),
]
RoutesOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Record every token's experts in a file.")
]
CorpusOption = Annotated[
    Path | None,
    typer.Option("--corpus", metavar="DIR", help="Where the run's corpus is, if not found."),
]

_PIPE_WIDTH = 10_000  # columns: a table in a file or a pipe is neither folded nor cut


class PlainTextConsole(Console):
    """Console that shows every ``str`` as it is: no markup, control characters as escapes."""

    def print(self, *texts: Any, **options: Any) -> None:
        """Print texts and renderables; those with styles are made by ``styled``."""
        super().print(*map(_shown, texts), **options)


def make_console(*, stderr: bool = False) -> Console:
    """Return the console of a standard stream."""
    console = PlainTextConsole(
        stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True
    )
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


stderr = make_console(stderr=True)


def show_progress(text: str) -> None:
    """Print a line of progress on stderr."""
    stderr.print(styled("[dim]{text}[/]", text=text))


def show_error(sentence: str) -> None:
    """Print the sentence that ends a command on stderr."""
    stderr.print(styled("[bold red]error:[/] {sentence}", sentence=sentence))


@dataclass(frozen=True, slots=True)
class Result:
    """What a command ends with: a ``value`` for ``--json``, how else it is shown, the exit code."""

    value: dict[str, Any]
    show: Callable[[Console], object]
    exit_code: int = 0


class CommandApp(typer.Typer):
    """The Typer app of one command."""

    def command(self, *names: Any, **settings: Any) -> Callable[..., Any]:
        """Register a function, which runs once the deferred imports of its module are done.

        One that returns a ``Result`` has the option ``--json``; the result is printed by it.
        """
        register = super().command(*names, **settings)

        def enter(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def run(*given: Any, **options: Any) -> None:
                finish_imports()
                as_json = has_result and options.pop("as_json")
                result = function(*given, **options)
                if has_result:
                    print_result(result.value, as_json=as_json, show=result.show)
                    if result.exit_code:
                        raise typer.Exit(result.exit_code)

            signature = inspect.signature(function)
            has_result = signature.return_annotation is Result
            if has_result:
                option = inspect.Parameter(
                    "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption
                )
                options = [*signature.parameters.values(), option]
                vars(run)["__signature__"] = signature.replace(parameters=options)
                run.__annotations__ = function.__annotations__ | {"as_json": JsonOption}
            register(run)
            return function

        return enter

    def run(self, words: list[str], *, prog_name: str) -> int:
        """Parse ``words``, run the function, return the exit code; wrong options raise."""
        command = typer.main.get_command(self)
        if not words and self.info.no_args_is_help is True:
            words = ["--help"]
        code = command.main(words, prog_name=prog_name, standalone_mode=False)
        return code if isinstance(code, int) else 0


def command_app(**settings: Any) -> CommandApp:
    """Return the app of one command; a UserError passes through it to ``main``."""
    return CommandApp(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def print_result(
    value: dict[str, Any], *, as_json: bool, show: Callable[[Console], object]
) -> None:
    """Print a result: by ``show``, or as one JSON object on the last line of stdout.

    Numbers that JSON does not have (NaN, infinity) are null.
    """
    with named_stdout():
        if as_json:
            text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
            sys.stdout.write(text + "\n")
        else:
            show(make_console())


def print_table(
    console: Console,
    columns: Sequence[str | Text],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str | Text | None = None,
    align: str = "l",
) -> None:
    """Print rows of texts, styled or plain. ``align`` has l or r per column; r where it is shorter.

    Without any column name there is no header.
    """
    table = Table(box=None, padding=(0, 1), show_header=any(map(str, columns)))
    for column, side in zip(columns, align.ljust(len(columns), "r"), strict=True):
        table.add_column(
            _shown(column), justify="left" if side == "l" else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(_shown, row))
    if title is not None:
        console.print(_shown(title), style="italic")
    console.print(table)


def show_commands(commands: dict[str, str]) -> None:
    """Print the list of commands."""
    console = make_console()
    about = "multilingual Mixture-of-Experts models in PyTorch"
    console.print(styled("[bold]moesaic[/] {version}: {about}\n", version=__version__, about=about))
    console.print("usage: moesaic COMMAND [OPTIONS]      (moesaic COMMAND --help has an example)\n")
    names = ((styled("[bold cyan]{name}[/]", name=name), what) for name, what in commands.items())
    print_table(console, ("", ""), names, align="ll")


def _shown(value: Any) -> Any:
    """Return a ``str`` as plain text with its control characters as escapes, others as they are."""
    return Text(visible(value)) if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
