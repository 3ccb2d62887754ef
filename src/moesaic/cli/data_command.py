"""``moesaic data``: build corpora, count their rows, and show what was kept and dropped."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import Result, command_app, show_progress
from moesaic.cli.show_corpus import (
    show_built,
    show_dropped_rows,
    show_pairs,
    show_stats,
    show_texts,
)

with deferred():
    from moesaic.core.errors import DataError, did_you_mean
    from moesaic.corpus.build_corpus import build_corpus
    from moesaic.corpus.corpus_recipes import CorpusRecipe
    from moesaic.corpus.corpus_stats import (
        DroppedFilter,
        corpus_stats,
        sample_dropped,
        sample_pairs,
        sample_texts,
    )
    from moesaic.corpus.known_corpora import open_known_corpus
    from moesaic.corpus.languages import resolve_language
    from moesaic.corpus.readers.documents import EachLine, EachParagraph, WholeFile
    from moesaic.corpus.sources.document_files import DocumentFiles, Documents, DomainOfFolder

_MAX_WORKERS = 8  # each has one direction in memory

app = command_app(no_args_is_help=True, help="Build and inspect corpora.")
CorpusArgument = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A corpus name, a recipe file (.yaml) or a folder.")
]


@app.command("build")
def build_command(
    which: CorpusArgument,
    *,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Make a corpus called CORPUS of these text and .jsonl files: a file, a folder or "
            "a pattern; may be repeated. Each folder is a domain.",
        ),
    ] = None,
    document: Annotated[
        str, typer.Option(metavar="file|paragraph|line", help="What a document of --texts is.")
    ] = "file",
    language: Annotated[
        str, typer.Option("--in", help="Language of --texts, any spelling (default: not stated).")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="The corpus folder to write.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Processes; the result is the same for any number."),
    ] = None,
) -> Result:
    """Build a corpus from software packages or from your own files.

    Example: [cyan]moesaic data build catalogues-small[/]

    Example: [cyan]moesaic data build documents --texts "books/*.txt" --in en[/]
    """
    count = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    recipe = _text_recipe(which, texts, document, language) if texts else _recipe(which)
    corpus = build_corpus(recipe, out=out, progress=show_progress, workers=count)
    value = {
        "path": str(corpus.path),
        "pairs": corpus.manifest["pairs"],
        "languages": len(corpus.languages),
    }
    return Result(value, lambda console: show_built(corpus, console))


@app.command()
def stats(
    which: CorpusArgument,
    *,
    every: Annotated[bool, typer.Option("--all", help="Every direction and source.")] = False,
) -> Result:
    """Count pairs by direction and split, and dropped pairs by reason.

    Example: [cyan]moesaic data stats catalogues-small[/]
    """
    corpus = open_known_corpus(which)
    found = corpus_stats(corpus)
    names = ("name", "too_small", "reasons", "domains", "missing", "empty", "sources")
    value = {name: corpus.manifest[name] for name in names}
    value |= {"read": found.read, "pairs": found.kept, "dropped": found.dropped}
    value |= {
        "splits": found.splits,
        "directions": [entry.model_dump(by_alias=True) for entry in found.directions],
        "texts": [
            {"language": code} | entry.model_dump(by_alias=True)
            for code, entry in found.texts.items()
        ],
    }
    return Result(value, lambda console: show_stats(corpus, found, console, every=every))


@app.command()
def show(
    which: CorpusArgument,
    *,
    source: Annotated[
        str, typer.Option("--from", help="Source language of pairs.", show_default="en")
    ] = "",
    target: Annotated[
        str, typer.Option("--to", help="Target language; without it, texts are shown.")
    ] = "",
    language: Annotated[str, typer.Option("--in", help="Only texts in this language.")] = "",
    split: Annotated[str, typer.Option(help="train, valid, test or a domain.")] = "train",
    count: Annotated[int, typer.Option("-n", min=1, help="How many pairs or texts.")] = 10,
    seed: Annotated[int, typer.Option(help="Which random ones.")] = 0,
) -> Result:
    """Show random pairs of one direction, with the package of each, or random texts.

    Example: [cyan]moesaic data show catalogues-small --to de -n 5[/]
    """
    corpus = open_known_corpus(which)
    if (source and not target) or (language and target):
        raise DataError("expected --to (and --from) to show pairs, or --in alone to show texts")
    if not target:
        code = resolve_language(language).code if language else ""
        texts = sample_texts(corpus, language=code, split=split, count=count, seed=seed)
        shown = [{"text": t.text, "language": t.language, "domain": t.domain} for t in texts]
        return Result({"split": split, "texts": shown}, lambda console: show_texts(shown, console))
    codes = resolve_language(source or "en").code, resolve_language(target).code
    chosen = sample_pairs(
        corpus, source=codes[0], target=codes[1], split=split, count=count, seed=seed
    )
    rows = [{"source": p.source, "target": p.target, "origin": p.origin} for p in chosen]
    return Result(
        {"direction": "-".join(codes), "split": split, "pairs": rows},
        lambda console: show_pairs(rows, codes, console),
    )


@app.command()
def dropped(
    which: CorpusArgument,
    *,
    reason: Annotated[str, typer.Option(help="Only rows dropped for this reason.")] = "",
    source: Annotated[str, typer.Option("--from", help="Only rows from this language.")] = "",
    target: Annotated[str, typer.Option("--to", help="Only rows into this language.")] = "",
    count: Annotated[int, typer.Option("-n", min=1, help="How many rows of a reason.")] = 5,
) -> Result:
    """Show rows that a corpus dropped, with the reason of each.

    The first 50 of each direction and reason are kept beside a corpus.

    Example: [cyan]moesaic data dropped mine --reason placeholders[/]
    """
    corpus = open_known_corpus(which)
    reasons = corpus_stats(corpus).reasons
    if reason and reason not in reasons:
        known = ", ".join(reasons)
        raise DataError(
            f'--reason: unknown reason "{reason}": expected one of {known}'
            f"{did_you_mean(reason, reasons)}"
        )
    chosen = DroppedFilter(
        reason,
        resolve_language(source).code if source else "",
        resolve_language(target).code if target else "",
    )
    rows = [asdict(row) for row in sample_dropped(corpus, chosen, count=count)]
    return Result(
        {"corpus": corpus.name, "dropped": rows},
        lambda console: show_dropped_rows(rows, reasons, console),
    )


@app.command()
def schema() -> None:
    """Print the JSON Schema of corpus recipes: completion and checks in editors.

    Example: [cyan]moesaic data schema > corpus.schema.json[/]
    """
    sys.stdout.write(CorpusRecipe.schema_json())


def _text_recipe(name: str, paths: list[str], document: str, language: str) -> CorpusRecipe:
    """Return the recipe of a corpus of documents. Raises DataError: an unknown kind of document."""
    units = {"file": WholeFile(), "paragraph": EachParagraph(), "line": EachLine()}
    if document not in units:
        raise DataError(
            f'--document "{document}": expected {", ".join(units)}{did_you_mean(document, units)}'
        )
    files = tuple(
        DocumentFiles(
            path=path, document=units[document], language=language, domain=DomainOfFolder()
        )
        for path in paths
    )
    return CorpusRecipe(name=name, source=Documents(files=files))


def _recipe(which: str) -> CorpusRecipe | str:
    if which.endswith((".yaml", ".yml")):
        try:
            return CorpusRecipe.from_yaml(Path(which).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(f"{which}: there is no such file") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{which}: not UTF-8 at byte {error.start}") from error
    return which
