"""The table of ``docs/fine-tuning-choices.md``: choices of what is tuned, with their seeds."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from seed_statistics import shown

MARKERS = ("<!-- results: begin -->", "<!-- results: end -->")


def write_page(found: Mapping[str, Any], *, path: Path) -> None:
    """Replace the text between the markers of the page."""
    head, _, rest = path.read_text(encoding="utf-8").partition(MARKERS[0])
    body, tail = "\n".join(_table(found)), rest.partition(MARKERS[1])[2]
    path.write_text(f"{head}{MARKERS[0]}\n\n{body}\n\n{MARKERS[1]}{tail}", encoding="utf-8")


def _table(found: Mapping[str, Any]) -> Iterator[str]:
    seeds, before = len(next(iter(found["seeds"].values()))), found["before"]
    steps, commit = found["steps"], found["commit"][:10]
    yield (
        f"{seeds} seeds of {steps} steps; commit `{commit}`. Losses are nats "
        "per token of held-out rows; intervals are 95 % (Student's t over seeds)."
    )
    yield ""
    yield "| trained | parameters | saved, kB | seconds | tuned language | others | forgotten |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    yield f"| nothing | 0 | 0 | 0 | {before['tuned']:.3f} | {before['others']:.3f} | 0 |"
    for name, measured in found["choices"].items():
        cells = [f"{measured[m]['mean'] / unit:,.0f}" for m, unit in _COUNTS.items()]
        cells += [shown(measured[m]) for m in ("tuned", "others")]
        yield f"| {name} | {' | '.join(cells)} | {shown(measured['forgotten'], sign='+')} |"
    yield ""
    yield "| difference, seed by seed | tuned language | forgotten |"
    yield "|---|---:|---:|"
    for pair, one in found["differences"].items():
        tuned, forgotten = (shown(one[m], sign="+") for m in ("tuned", "forgotten"))
        yield f"| {pair} | {tuned} | {forgotten} |"


_COUNTS = {"parameters": 1, "saved_bytes": 1000, "seconds": 1}
