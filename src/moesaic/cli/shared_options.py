"""Options and output shared by all commands: results on stdout, progress on stderr."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.core.errors import UserError

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

stderr = Console(stderr=True, highlight=False)


def show_progress(text: str) -> None:
    """Print a line of progress on stderr."""
    stderr.print(f"[dim]{escape(text)}[/]")


def command_app(**settings: Any) -> typer.Typer:
    """Return the Typer app of one command; a UserError passes through it to ``main``."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def import_user_files(files: list[Path] | None) -> None:
    """Import Python files, which registers the config choices that they define.

    Raises UserError if a file does not exist; exceptions inside a file are not caught.
    """
    for file in files or []:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise UserError(f"--use {file}: there is no such Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)


def print_result(
    value: dict[str, Any], *, as_json: bool, show: Callable[[Console], object]
) -> None:
    """Print a result: by ``show``, or as one JSON object on the last line of stdout."""
    if as_json:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    else:
        show(Console(highlight=False))


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    align: str = "l",
) -> None:
    """Print rows of Rich markup. ``align`` has an l or r for each column; r where it is shorter.

    Without any column name there is no header.
    """
    table = Table(
        box=None, title=title, title_justify="left", padding=(0, 1), show_header=any(columns)
    )
    for column, side in zip(columns, align.ljust(len(columns), "r"), strict=True):
        table.add_column(column, justify="left" if side == "l" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
