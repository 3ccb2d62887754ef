"""``moesaic data``: build corpora, count their pairs, and show examples."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import (
    JsonOption,
    command_app,
    print_result,
    print_table,
    show_progress,
)
from moesaic.cli.styled_text import styled

with deferred():
    from moesaic.core.errors import DataError, did_you_mean
    from moesaic.core.units import show_count
    from moesaic.corpus.build_corpus import build_corpus
    from moesaic.corpus.corpus import Corpus
    from moesaic.corpus.corpus_recipes import NAMED_CORPORA, CorpusRecipe
    from moesaic.corpus.corpus_stats import CorpusStats, sample_pairs
    from moesaic.corpus.corpus_stats import corpus_stats as corpus_stats
    from moesaic.corpus.data_home import corpora_dir
    from moesaic.corpus.languages import resolve_language

_MAX_DIRECTIONS = 20
_MAX_SOURCES = 12
_MAX_NAMES = 8
_SIZE_THRESHOLDS = (1_000, 10_000, 100_000)
_MAX_WORKERS = 8  # each has one direction in memory

app = command_app(no_args_is_help=True, help="Build and inspect corpora.")
CorpusArgument = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A corpus name, a recipe file (.yaml) or a folder.")
]


@app.command("build")
def build_command(
    which: CorpusArgument,
    *,
    out: Annotated[Path | None, typer.Option(help="The corpus folder to write.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; the result is the same for any number.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build a corpus from software packages or from your own files.

    Example: [cyan]moesaic data build catalogues-small[/]
    """
    count = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    corpus = build_corpus(_recipe(which), out=out, progress=show_progress, workers=count)
    value = {"path": str(corpus.path), "pairs": corpus.manifest["pairs"]} | {
        "languages": len(corpus.languages)
    }
    print_result(value, as_json=as_json, show=lambda console: show_built(corpus, console))


@app.command()
def stats(
    which: CorpusArgument,
    *,
    every: Annotated[bool, typer.Option("--all", help="Every direction and source.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Count pairs by direction and split, and dropped pairs by reason.

    Example: [cyan]moesaic data stats catalogues-small[/]
    """
    corpus = _open_corpus(which)
    found = corpus_stats(corpus)
    value = asdict(found) | {"read": found.read, "pairs": found.kept, "dropped": found.dropped}
    value |= {"splits": found.splits, "sources": corpus.manifest["sources"]}
    print_result(
        value, as_json=as_json, show=lambda console: show_stats(corpus, console, every=every)
    )


@app.command()
def show(
    which: CorpusArgument,
    *,
    source: Annotated[str, typer.Option("--from", help="Source language.")] = "en",
    target: Annotated[str, typer.Option("--to", help="Target language.")],
    split: Annotated[str, typer.Option(help="train, valid, test or a domain.")] = "train",
    count: Annotated[int, typer.Option("-n", help="How many pairs.")] = 10,
    seed: Annotated[int, typer.Option(help="Which random pairs.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show random pairs of one direction, with the package of each.

    Example: [cyan]moesaic data show catalogues-small --to de -n 5[/]
    """
    corpus = _open_corpus(which)
    codes = resolve_language(source).code, resolve_language(target).code
    chosen = sample_pairs(
        corpus, source=codes[0], target=codes[1], split=split, count=count, seed=seed
    )
    rows = [{"source": p.source, "target": p.target, "origin": p.origin} for p in chosen]
    print_result(
        {"direction": "-".join(codes), "split": split, "pairs": rows},
        as_json=as_json,
        show=lambda console: show_pairs(rows, codes, console),
    )


def _recipe(which: str) -> CorpusRecipe | str:
    if which.endswith((".yaml", ".yml")):
        try:
            return CorpusRecipe.from_yaml(Path(which).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{which}: there is no such file") from error
    return which


def _open_corpus(which: str) -> Corpus:
    path = Path(which)
    if (path / "corpus.json").is_file():
        return Corpus.open(path)
    if (corpora_dir() / which / "corpus.json").is_file():
        return Corpus.open(corpora_dir() / which)
    if which in NAMED_CORPORA:
        raise DataError(f"{which} is not built yet: run `moesaic data build {which}`")
    built = [p.name for p in corpora_dir().glob("*") if (p / "corpus.json").is_file()]
    known = sorted({*NAMED_CORPORA, *built})
    raise DataError(
        f'there is no corpus "{which}"{did_you_mean(which, known)} (known: {", ".join(known)})'
    )


def show_built(corpus: Corpus, console: Console) -> None:
    """Print the size of a new corpus, and packages that were unavailable."""
    console.print(
        styled(
            "[bold]{name}[/]: {pairs:,} pairs, {languages} languages, in {path}",
            name=corpus.name,
            pairs=corpus.manifest["pairs"],
            languages=len(corpus.languages),
            path=corpus.path,
        )
    )
    _show_missing(corpus_stats(corpus), console)


def show_stats(corpus: Corpus, console: Console, *, every: bool = False) -> None:
    """Print counts of a corpus: the largest directions and sources, or all (``every``)."""
    found = corpus_stats(corpus)
    console.print(
        styled(
            "[bold]{name}[/]: {kept:,} pairs of {read:,} read",
            name=found.name,
            kept=found.kept,
            read=found.read,
        )
    )
    sizes = {n: found.num_directions_with(n) for n in _SIZE_THRESHOLDS}
    parts = "".join(f", {count} with {n:,} pairs or more" for n, count in sizes.items() if count)
    console.print(f"directions: {len(found.directions)}{parts}")
    for split, packages in found.domains.items():
        console.print(
            styled(
                "[cyan]{split}[/] is held out: {packages} "
                "[dim](moesaic eval RUN --split {split})[/]",
                split=split,
                packages=", ".join(packages),
            )
        )
    _show_missing(found, console)
    console.print()
    _show_directions(found, console, count=len(found.directions) if every else _MAX_DIRECTIONS)
    _show_dropped(found, console)
    sources = corpus.manifest["sources"]
    _show_sources(sources, console, count=len(sources) if every else _MAX_SOURCES)


def show_pairs(rows: list[dict[str, Any]], codes: tuple[str, str], console: Console) -> None:
    """Print pairs with their origins."""
    cells = (
        (r["source"], r["target"], styled("[dim]{origin}[/]", origin=r["origin"])) for r in rows
    )
    print_table(console, (*codes, "origin"), cells, align="lll")


def _show_directions(found: CorpusStats, console: Console, *, count: int) -> None:
    rows = []
    for d in found.directions[:count]:
        reasons = sorted(d.dropped.items(), key=lambda item: -item[1])[:3]
        counts = (d.read, d.kept, *(d.splits[name].pairs for name in found.splits))
        rows.append(
            (
                f"{d.source}-{d.target}",
                *map(_short_count, counts),
                ", ".join(f"{name} {show_count(n)}" for name, n in reasons),
            )
        )
    totals = map(_short_count, (found.read, found.kept, *found.splits.values()))
    rows.append((styled("[bold]all[/]"), *totals, ""))
    columns = ("direction", "read", "kept", *found.splits, "dropped, mostly for")
    print_table(console, columns, rows, align="l" + "r" * (len(columns) - 2) + "l")
    if len(found.directions) > count:
        left = len(found.directions) - count
        console.print(f"and {left} smaller ones: --all shows them", style="dim")
    if found.too_small:
        names = sorted(found.too_small, key=lambda name: -found.too_small[name])
        console.print(f"too small to keep: {_abbreviate_names(names)}", style="dim")


def _show_dropped(found: CorpusStats, console: Console) -> None:
    console.print(styled("\n[bold]dropped[/] [dim](share of all pairs read)[/]"))
    rows = (
        (
            styled("[cyan]{name}[/]", name=name),
            f"{count:,}",
            styled("[dim]{share:.1f} %[/]", share=100 * count / max(1, found.read)),
            found.reasons[name],
        )
        for name, count in found.dropped.items()
    )
    print_table(console, ("",) * 4, rows, align="lrrl")


def _show_sources(sources: dict[str, dict[str, Any]], console: Console, *, count: int) -> None:
    console.print(
        styled("\n[bold]sources[/] [dim](a pair counts for the first source that has it)[/]")
    )
    largest = sorted(sources.items(), key=lambda item: (-item[1]["pairs"], item[0]))
    rows = (
        (
            styled("[cyan]{name}[/]", name=name),
            f"{about['pairs']:,}",
            about["licence"],
            styled("[dim]{version}[/]", version=about["version"]),
        )
        for name, about in largest[:count]
    )
    print_table(console, ("",) * 4, rows, align="lrll")
    if len(largest) > count:
        console.print(f"and {len(largest) - count} smaller ones: --all shows them", style="dim")


def _show_missing(found: CorpusStats, console: Console) -> None:
    if found.missing:
        console.print(
            styled(
                "[yellow]{count} packages were unavailable[/] and are not in it: {names}",
                count=len(found.missing),
                names=_abbreviate_names(list(found.missing)),
            )
        )


def _abbreviate_names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _short_count(count: int) -> str:
    """Format with all digits up to 9,999, then shortened (--json has exact counts)."""
    return f"{count:,}" if count < 10_000 else show_count(count)
