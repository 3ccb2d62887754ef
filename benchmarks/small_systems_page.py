"""The table of ``docs/small-systems.md``: variants with their seeds, and differences by seed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seed_statistics import shown

MARKERS = ("<!-- results: begin -->", "<!-- results: end -->")


def write_page(results: Mapping[str, Any], *, path: Path) -> None:
    """Replace the text between the markers of the page."""
    head, _, rest = path.read_text(encoding="utf-8").partition(MARKERS[0])
    body = "\n".join(line for name, found in results.items() for line in _section(name, found))
    tail = rest.partition(MARKERS[1])[2]
    text = f"{head}{MARKERS[0]}\n\n{body}\n{MARKERS[1]}{tail}"
    path.write_text(text, encoding="utf-8")


def _section(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    variants = found["variants"]
    seeds = next(iter(found["seeds"].values()))
    steps = next(iter(seeds.values()))["steps"]
    yield f"### {name}"
    yield ""
    yield (
        f"Claim: {found['claim']} {len(seeds)} seeds, {steps} steps a run; commit "
        f"`{found['commit'][:10]}`. Intervals are 95 % (Student's t over seeds)."
    )
    yield ""
    metrics = list(dict.fromkeys(metric for one in variants.values() for metric in one))
    yield from _table(
        ["variant", "parameters", "active", *metrics],
        [
            [
                variant,
                f"{found['size'][variant]['parameters']:,}",
                f"{found['size'][variant]['active']:,}",
                *(shown(measured[m]) if m in measured else "" for m in metrics),
            ]
            for variant, measured in variants.items()
        ],
    )
    rows = [
        [pair, *(shown(one[m], sign="+") if m in one else "" for m in metrics)]
        for pair, one in found["differences"].items()
    ]
    if rows:
        yield from _table(["difference, seed by seed", *metrics], rows)


def _table(names: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(names) + " |"
    yield "|---" + "|---:" * (len(names) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
