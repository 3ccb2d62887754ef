"""Printing corpora: counts with their shares, samples of pairs, and dropped rows."""

from typing import Any

from rich.console import Console

from moesaic.cli.deferred_imports import deferred
from moesaic.cli.shared_options import print_table
from moesaic.cli.styled_text import cyan, styled

with deferred():
    from moesaic.core.errors import listed
    from moesaic.core.units import show_count
    from moesaic.corpus.corpus import Corpus
    from moesaic.corpus.corpus_manifest import DirectionEntry, TextEntry
    from moesaic.corpus.corpus_stats import CorpusStats, corpus_stats

_MAX_DIRECTIONS = 20
_MAX_SOURCES = 12
_SHOWN_CHARACTERS = 160
_SIZE_THRESHOLDS = (1_000, 10_000, 100_000)


def show_built(corpus: Corpus, console: Console) -> None:
    """Print the size of a new corpus, and what of its recipe is not in it."""
    rows = (
        f"{corpus.manifest['pairs']:,} pairs"
        if corpus.directions
        else f"{sum(sum(e['splits'].values()) for e in corpus.manifest['texts'].values()):,} texts"
    )
    console.print(
        styled(
            "[bold]{name}[/]: {rows}, {languages} languages, in {path}",
            name=corpus.name,
            rows=rows,
            languages=len(corpus.languages),
            path=corpus.path,
        )
    )
    found = corpus_stats(corpus)
    for code, text in found.texts.items():
        console.print(f"text in {code}: {text.kept:,} of {_rows(text.rows_read)}")
    _show_missing(found, console)
    _show_too_small(found, console)
    for sentence in corpus.describe_empty_splits():
        console.print(styled("[yellow]{sentence}[/]", sentence=sentence))
    if sum(found.dropped.values()):
        console.print(f"dropped rows: moesaic data dropped {corpus.path}", style="dim")


def show_stats(
    corpus: Corpus, found: CorpusStats, console: Console, *, every: bool = False
) -> None:
    """Print the statistics of a corpus: the largest directions and sources, or all (``every``)."""
    console.print(
        styled(
            "[bold]{name}[/]: {kept:,} of {read:,} pairs read are kept ({share})",
            name=found.name,
            kept=found.kept,
            read=found.read,
            share=_share(found.kept, found.read),
        )
        if found.directions or not found.texts
        else styled("[bold]{name}[/]: text in one language", name=found.name)
    )
    sizes = {n: found.num_directions_with(n) for n in _SIZE_THRESHOLDS}
    parts = "".join(f", {count} with {n:,} pairs or more" for n, count in sizes.items() if count)
    if found.directions:
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
    for sentence in corpus.describe_empty_splits():
        console.print(styled("[yellow]{sentence}[/]", sentence=sentence))
    console.print()
    if found.directions:
        _show_directions(found, console, count=len(found.directions) if every else _MAX_DIRECTIONS)
    if found.texts:
        _show_texts(found, console)
    if found.dropped:
        _show_dropped(found, console)
    sources = corpus.manifest["sources"]
    _show_sources(sources, console, count=len(sources) if every else _MAX_SOURCES)


def show_pairs(rows: list[dict[str, Any]], codes: tuple[str, str], console: Console) -> None:
    """Print pairs with their origins."""
    cells = (
        (r["source"], r["target"], styled("[dim]{origin}[/]", origin=r["origin"])) for r in rows
    )
    print_table(console, (*codes, "origin"), cells, align="lll")


def show_texts(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the beginnings of texts, each with its language and domain."""
    cells = (
        (_beginning(r["text"]), r["language"], styled("[dim]{domain}[/]", domain=r["domain"]))
        for r in rows
    )
    print_table(console, ("text", "language", "domain"), cells, align="lll")


def _beginning(text: str) -> str:
    line = " ".join(text[: 2 * _SHOWN_CHARACTERS].split())
    cut = len(text) > len(line) or len(line) > _SHOWN_CHARACTERS
    return f"{line[:_SHOWN_CHARACTERS]} ... ({len(text):,} characters)" if cut else line


def show_dropped_rows(
    rows: list[dict[str, Any]], reasons: dict[str, str], console: Console
) -> None:
    """Print dropped rows by reason, each with what the reason means."""
    if not rows:
        console.print("no such row was dropped")
    for reason in dict.fromkeys(row["reason"] for row in rows):
        console.print(
            styled("[cyan]{name}[/]: {why}", name=reason, why=reasons.get(reason, "see the source"))
        )
        cells = [
            (
                row["direction"],
                row["source"],
                row["target"],
                styled("[dim]{origin}[/]", origin=row["origin"]),
                styled("[dim]kept: {kept}[/]", kept=row["kept"]) if row["kept"] else "",
            )
            for row in rows
            if row["reason"] == reason
        ]
        print_table(console, ("",) * 5, cells, align="lllll")


def _show_directions(found: CorpusStats, console: Console, *, count: int) -> None:
    rows = []
    for d in found.directions[:count]:
        splits = {name: d.splits[name].pairs for name in found.splits}
        rows.append((f"{d.source}-{d.target}", *_counts(d, splits)))
    totals = [_short_count(n) for n in (found.read, found.kept)]
    parts = map(_short_count, found.splits.values())
    share = _share(found.kept, found.read)
    rows.append((styled("[bold]all[/]"), *totals, share, *parts, ""))
    columns = ("direction", "read", "kept", "share", *found.splits, "dropped, mostly for")
    print_table(console, columns, rows, align="l" + "r" * (len(columns) - 2) + "l")
    if len(found.directions) > count:
        left = len(found.directions) - count
        console.print(f"and {left} smaller ones: --all shows them", style="dim")
    _show_too_small(found, console)


def _show_texts(found: CorpusStats, console: Console) -> None:
    names = list(next(iter(found.texts.values())).splits)
    rows: list[tuple[str, ...]] = []
    for code, text in found.texts.items():
        rows.append((code, *_counts(text, text.splits)))
        for domain, counts in text.domains.items():
            kept, *parts = map(_short_count, (sum(counts.values()), *(counts[n] for n in names)))
            rows.append((f"  {domain}", "", kept, "", *parts, ""))
    columns = ("text in", "read", "kept", "share", *names, "dropped, mostly for")
    print_table(console, columns, rows, align="l" + "r" * (len(columns) - 2) + "l")


def _counts(entry: DirectionEntry | TextEntry, splits: dict[str, int]) -> tuple[str, ...]:
    """Return the cells of an entry: rows read and kept, their share, splits, reasons of drops."""
    reasons = sorted(entry.dropped.items(), key=lambda item: -item[1])[:3]
    return (
        *map(_short_count, (entry.rows_read, entry.kept)),
        _share(entry.kept, entry.rows_read),
        *map(_short_count, splits.values()),
        ", ".join(f"{name} {show_count(n)}" for name, n in reasons),
    )


def _show_dropped(found: CorpusStats, console: Console) -> None:
    console.print(styled("\n[bold]dropped[/] [dim](share of all rows read)[/]"))
    read = found.read + sum(text.rows_read for text in found.texts.values())
    rows = (
        (
            cyan(name),
            f"{count:,}",
            styled("[dim]{share}[/]", share=_share(count, read)),
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
    pairs = sum(about["pairs"] for about in sources.values())
    rows = (
        (
            cyan(name),
            _counted(about),
            styled("[dim]{share}[/]", share=_share(about["pairs"], pairs) if pairs else ""),
            about["licence"],
            styled("[dim]{version}[/]", version=about["version"]),
        )
        for name, about in largest[:count]
    )
    print_table(console, ("",) * 5, rows, align="lrrll")
    if len(largest) > count:
        console.print(f"and {len(largest) - count} smaller ones: --all shows them", style="dim")


def _show_too_small(found: CorpusStats, console: Console) -> None:
    if found.too_small:
        names = sorted(found.too_small, key=lambda name: -found.too_small[name])
        console.print(f"under min_pairs, so left out: {listed(names)}", style="yellow")


def _show_missing(found: CorpusStats, console: Console) -> None:
    for what, why in (
        (found.missing, "were unavailable and are not in it"),
        (found.empty, "had no row and are left out"),
    ):
        if what:
            console.print(
                styled(
                    "[yellow]{count} packages or files {why}[/]: {names}",
                    count=len(what),
                    why=why,
                    names=listed(what),
                )
            )


def _short_count(count: int) -> str:
    """Format with all digits up to 9,999, then shortened (--json has exact counts)."""
    return f"{count:,}" if count < 10_000 else show_count(count)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _counted(about: dict[str, Any]) -> str:
    """Return the pairs of a source, or its rows of text where it has no pairs."""
    texts = about.get("texts", 0)
    return f"{_rows(texts)} of text" if texts and not about["pairs"] else f"{about['pairs']:,}"


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)
