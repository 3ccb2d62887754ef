"""``moesaic data``: build corpora, count what was kept and dropped, look at pairs."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic.cli.common import Json, answer, talk, verb_app
from moesaic.core.errors import DataError, nearest
from moesaic.core.units import show_count
from moesaic.data.build import build
from moesaic.data.builders.named import NAMED, CorpusRecipe
from moesaic.data.corpus import Corpus
from moesaic.data.home import corpora_dir
from moesaic.data.languages import language
from moesaic.data.stats import sample
from moesaic.data.stats import stats as corpus_stats

app = verb_app(no_args_is_help=True, help="Build corpora, count them, look at them.")

Which = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A corpus name, a recipe file (.yaml) or a folder.")
]


class _Talk:
    """Progress of a build, as lines on stderr."""

    def say(self, text: str) -> None:
        talk.print(f"[dim]{escape(text)}[/]", highlight=False)


@app.command("build")
def build_corpus(
    which: Which,
    *,
    out: Annotated[Path | None, typer.Option(help="The corpus folder to write.")] = None,
    as_json: Json = False,
) -> None:
    """Build a corpus from ordinary packages or from your own files, whole or not at all.

    Example: [cyan]moesaic data build catalogues-small[/]
    """
    corpus = build(_recipe(which), out=out, progress=_Talk())
    value = {"path": str(corpus.path), "pairs": corpus.about["pairs"]} | {
        "languages": len(corpus.languages)
    }
    answer(value, as_json=as_json, show=lambda console: _show_built(corpus, console))


@app.command()
def stats(which: Which, *, as_json: Json = False) -> None:
    """Count pairs per direction and split, and what was dropped and why.

    Example: [cyan]moesaic data stats catalogues-small[/]
    """
    corpus = _open(which)
    found = corpus_stats(corpus)
    value = asdict(found) | {"read": found.read, "pairs": found.kept, "dropped": found.dropped}
    value |= {"sources": corpus.about["sources"]}
    answer(value, as_json=as_json, show=lambda console: _show_stats(corpus, console))


@app.command()
def show(
    which: Which,
    *,
    source: Annotated[str, typer.Option("--from", help="Source language.")] = "en",
    target: Annotated[str, typer.Option("--to", help="Target language.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "train",
    count: Annotated[int, typer.Option("-n", help="How many pairs.")] = 10,
    seed: Annotated[int, typer.Option(help="Which random pairs.")] = 0,
    as_json: Json = False,
) -> None:
    """Show random pairs of one direction, with the package that each came from.

    Example: [cyan]moesaic data show catalogues-small --to de -n 5[/]
    """
    corpus = _open(which)
    codes = language(source).code, language(target).code
    chosen = sample(corpus, source=codes[0], target=codes[1], split=split, count=count, seed=seed)
    rows = [{"source": p.source, "target": p.target, "origin": p.origin} for p in chosen]
    answer(
        {"direction": "-".join(codes), "split": split, "pairs": rows},
        as_json=as_json,
        show=lambda console: _show_pairs(rows, codes, console),
    )


def _recipe(which: str) -> CorpusRecipe | str:
    if which.endswith((".yaml", ".yml")):
        try:
            return CorpusRecipe.from_yaml(Path(which).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{which}: there is no such file") from error
    return which


def _open(which: str) -> Corpus:
    here = Path(which)
    if (here / "corpus.json").is_file():
        return Corpus.open(here)
    if (corpora_dir() / which / "corpus.json").is_file():
        return Corpus.open(corpora_dir() / which)
    if which in NAMED:
        raise DataError(f"{which} is not built yet: run `moesaic data build {which}`")
    built = [p.name for p in corpora_dir().glob("*") if (p / "corpus.json").is_file()]
    known = sorted({*NAMED, *built})
    raise DataError(
        f'there is no corpus "{which}"{nearest(which, known)} (known: {", ".join(known)})'
    )


def _show_built(corpus: Corpus, console: Console) -> None:
    console.print(
        f"[bold]{corpus.name}[/]: {corpus.about['pairs']:,} pairs, "
        f"{len(corpus.languages)} languages, in {corpus.path}"
    )


def _show_stats(corpus: Corpus, console: Console) -> None:
    found = corpus_stats(corpus)
    title = f"{found.name}: {found.kept:,} pairs of {found.read:,} read"
    table = Table(box=None, title=title, title_justify="left")
    for column in ("direction", "read", "kept", "train", "valid", "test", "dropped, and why"):
        table.add_column(column, justify="left" if column.startswith("d") else "right")
    for d in found.directions:
        why = sorted(d.dropped.items(), key=lambda item: -item[1])[:3]
        table.add_row(
            f"{d.source}-{d.target}",
            f"{d.read:,}",
            f"{d.kept:,}",
            *(f"{d.splits[name].pairs:,}" for name in ("train", "valid", "test")),
            ", ".join(f"{name} {show_count(n)}" for name, n in why),
        )
    console.print(table)
    console.print("\n[bold]why a pair is dropped[/]")
    for name, why in corpus.about["reasons"].items():
        console.print(f"  [cyan]{name}[/]  {why}", highlight=False)
    console.print("\n[bold]sources[/]")
    for name, about in corpus.about["sources"].items():
        line = f"  [cyan]{name}[/] {about['version']}  {about['pairs']:,} pairs  {about['licence']}"
        console.print(line, highlight=False)


def _show_pairs(rows: list[dict[str, Any]], codes: tuple[str, str], console: Console) -> None:
    table = Table(box=None)
    for column in (*codes, "origin"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(escape(row["source"]), escape(row["target"]), f"[dim]{row['origin']}[/]")
    console.print(table)
