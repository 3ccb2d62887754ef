"""Report section on forgetting: directions that a fine-tuned run was not tuned in."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesaic.report.html import Html, html_table
from moesaic.report.report_inputs import ReportInputs, lookup
from moesaic.report.score_sections import format_signed


def forgetting_section(inputs: ReportInputs) -> Html | None:
    """Return a table of chrF++ before and after tuning, with the change and its interval.

    None if nothing was scored before and after.
    """
    if not inputs.forgetting:
        return None
    rows = list(_rows(inputs))
    head = ("not tuned", "sentences", "chrF++ before", "chrF++ after", "change", "95 % interval")
    scored = inputs.forgetting["languages"].values()
    changes = [lookup(result, "differences", "before", "chrf") for result in scored]
    return html_table(head, rows=rows, caption=f"{count_worse(changes)}.")


def count_worse(changes: Sequence[Mapping[str, float]]) -> str:
    """Say how many of the directions that were not tuned lost chrF++ beyond their interval."""
    worse = sum(change["high"] < 0 for change in changes)
    of = f"{worse} of {len(changes)} directions that were not tuned"
    return f"{of} lost chrF++ beyond their interval"


def _rows(inputs: ReportInputs) -> Iterator[tuple[str, ...]]:
    found = inputs.forgetting
    for result in found["languages"].values():
        change = lookup(result, "differences", "before", "chrf")
        yield (result["name"], str(result["count"]), *_cells(result, change))
    yield ("mean", "", *_cells(found["mean"], lookup(found, "mean_differences", "before", "chrf")))


def _cells(scores: dict[str, Any], change: dict[str, float]) -> tuple[str, ...]:
    before, after = (f"{scores[name]['chrf']['score']:.1f}" for name in ("before", "model"))
    low, high = (format_signed(change[end]) for end in ("low", "high"))
    return before, after, format_signed(change["difference"]), f"{low} to {high}"
