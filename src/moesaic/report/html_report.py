"""The report: a run directory as one self-contained HTML file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import UserError
from moesaic.core.files import atomic_write
from moesaic.core.units import show_count, show_seconds
from moesaic.report.forgetting_section import forgetting_section
from moesaic.report.html import Html, tag
from moesaic.report.html_page import html_page, page_logo
from moesaic.report.quality_section import quality_section, quality_sentences
from moesaic.report.report_inputs import ReportInputs, lookup, read_report_inputs
from moesaic.report.routing_sections import atlas_section, health_section, insight_section
from moesaic.report.score_sections import (
    METRIC_NAMES,
    format_signed,
    samples_section,
)
from moesaic.report.training_sections import latest_value, run_section, training_section

_Content = TypeVar("_Content", bound=Html | None)

_SECTIONS = (
    ("scores", "Scores", quality_section),
    ("forgetting", "What was not tuned", forgetting_section),
    ("samples", "Sample translations", samples_section),
    ("training", "Training", training_section),
    ("routing", "Routing atlas", atlas_section),
    ("insight", "What routing depends on", insight_section),
    ("health", "Router health", health_section),
    ("run", "The run", run_section),
)


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` from the files of the run directory, and return its path.

    A note stands in the place of each missing file. Raises CheckpointError if there is no run.
    """
    run = RunDir.open(Path(run_dir))
    atomic_write(run.report, render_page(read_report_inputs(run)))
    return run.report


def render_page(inputs: ReportInputs) -> str:
    """Return the whole document."""
    return html_page(
        f"{inputs.name} · moesaic report",
        header=_guarded(_header, inputs, name="The headline"),
        sections=[
            (name, title, content)
            for name, title, build in _SECTIONS
            if (content := _guarded(build, inputs, name=title)) is not None
        ],
    )


def _guarded(
    build: Callable[[ReportInputs], _Content], inputs: ReportInputs, *, name: str
) -> _Content | Html:
    """Build a section, None to leave it out; values of other kinds than ours become a gap."""
    try:
        return build(inputs)
    except _WRONG_KINDS as error:
        words = f"{name} could not be made: a file of the run has values of another kind than ours"
        return tag("p", f"{words} ({type(error).__name__}: {str(error)[:200]}).", class_="gap")


_WRONG_KINDS = (
    *(ArithmeticError, AttributeError, AssertionError, LookupError, RecursionError),
    *(TypeError, ValueError, UserError),
)


def _header(inputs: ReportInputs) -> Html:
    summary = inputs.summary
    made = str(summary.get("created") or "").replace("T", " ")[:16]
    words = quality_sentences(inputs)
    lead = " ".join(words) or "This run has not been evaluated yet."
    known = str(inputs.config.get("name") or "")
    recipe = tag("small", f" recipe {known}") if known not in ("", inputs.name) else None
    tiles = [
        tag("div", tag("span", label), tag("b", value), tag("small", note), class_="tile")
        for label, value, note in _headline_tiles(inputs)
    ]
    return tag(
        "header",
        tag(
            "div",
            page_logo(),
            tag("span", "moesaic"),
            tag("span", made, class_="soft"),
            class_="brand",
        ),
        tag("h1", inputs.name, recipe),
        tag("p", lead, class_="lead"),
        *(tag("p", sentence, class_="soft") for sentence in summary.get("disagreements") or ()),
        tag("div", *tiles, class_="tiles"),
    )


def _headline_tiles(inputs: ReportInputs) -> list[tuple[str, str, str]]:
    """Return the headline numbers that are known: (label, value, note)."""
    summary: Mapping[str, Any] = inputs.summary
    tiles = []
    systems = summary.get("systems") or ["model"]
    for metric, title in METRIC_NAMES.items():
        found = lookup(summary, "mean", systems[0], metric)
        if found:
            count = len(summary.get("languages") or ())
            ends = [found.get(end, found["score"]) for end in ("low", "high")]
            note = f"{ends[0]:.1f} to {ends[1]:.1f}, {count} languages"
            tiles.append((f"mean {title}", f"{found['score']:.1f}", note))
    for other, label in (("copy", "lead over copying"), ("memory", "lead over memory")):
        leads = [
            lookup(summary, "mean_differences", other, metric, "difference")
            for metric in METRIC_NAMES
        ]
        if leads[0] is not None:
            note = "chrF++" + (f"; {format_signed(leads[1])} BLEU" if leads[1] is not None else "")
            tiles.append((label, format_signed(leads[0]), note))
    kept = lookup(summary, "placeholders", systems[0])
    if kept and kept["of"]:
        note = f"all of them in {kept['kept']} of {kept['of']} strings with any"
        tiles.append(("placeholders kept", f"{kept['rate']:.0%}", note))
    counts = summary.get("counts") or {}
    if "parameters" in counts:
        active = counts.get("active_parameters")
        note = f"{show_count(active)} active per token" if active else "in all"
        tiles.append(("parameters", show_count(counts["parameters"]), note))
    tokens = counts.get("train_tokens") or latest_value(inputs, "train/tokens")
    if tokens:
        seconds = lookup(summary, "seconds", "train")
        note = f"in {show_seconds(seconds)}" if seconds else "both sides"
        tiles.append(("tokens trained on", show_count(tokens), note))
    loss = latest_value(inputs, "valid/loss")
    if loss is not None:
        tiles.append(("validation loss", f"{loss:.2f}", "nats per token"))
    return tiles
