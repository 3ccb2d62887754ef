"""The page of a comparison of runs: one self-contained HTML file with tables and curves."""

from pathlib import Path

from moesaic.core.files import atomic_write
from moesaic.report.charts import ChartSeries, line_chart
from moesaic.report.html import Html, html_table, join_html, tag
from moesaic.report.html_page import html_page
from moesaic.report.report_inputs import QUALITY_TITLE
from moesaic.report.run_comparison import RunComparison

_CURVES = (
    ("valid/loss", "Validation loss, nats per token", False),
    ("train/loss", "Training loss, nats per token", False),
    ("train/lr", "Learning rate", True),
    ("train/grad_norm", "Gradient norm, before clipping", True),
    ("perf/tokens_per_s", "Tokens per second", True),
    ("moe/max_vio", "Maximum load above the mean load (max violation)", True),
)


def write_comparison(comparison: RunComparison, path: Path) -> Path:
    """Write the page to ``path`` and return it. Raises UserError if it cannot be written."""
    atomic_write(path, comparison_page(comparison))
    return path


def comparison_page(comparison: RunComparison) -> str:
    """Return the whole document."""
    names = [run.name for run in comparison.runs]
    header = tag(
        "header",
        tag("h1", " and ".join(names) if len(names) == 2 else f"{len(names)} runs"),
        *(tag("p", note, class_="gap") for note in comparison.notes()),
    )
    sections = [
        ("facts", "Side by side", _table("what", comparison.facts(), names)),
        ("languages", "chrF++ / BLEU by language", _table("language", comparison.scores(), names)),
        ("curves", "Curves", tag("div", *_charts(comparison), class_="charts")),
        ("config", "Config", _table("key", comparison.config_differences(), names)),
    ]
    return html_page(" · ".join(names), header=header, sections=sections)


def _table(first: str, rows: dict[str, list[str]], names: list[str]) -> Html:
    if not rows:
        return tag("p", "No differences." if first == "key" else "Nothing to show.", class_="soft")
    cells = [[title, *values] for title, values in rows.items()]
    captions = {"key": "Config keys whose values differ", "language": "Scores of the model"}
    return html_table([first, *names], rows=cells, caption=captions.get(first, "Facts of each run"))


def _charts(comparison: RunComparison) -> list[Html]:
    charts = [_quality_chart(comparison)]
    for metric, title, from_zero in _CURVES:
        curves = [
            run.inputs.curve(metric, label=run.name, color=color)
            for color, run in enumerate(comparison.runs)
        ]
        drawn = [curve for curve in curves if curve]
        if drawn:
            charts.append(line_chart(drawn, title=title, from_zero=from_zero))
    return charts


def _quality_chart(comparison: RunComparison) -> Html:
    """Return chrF++ at the scored checkpoints of the runs that have a curve.json."""
    curves: list[ChartSeries] = []
    strings = set[str]()
    for color, run in enumerate(comparison.runs):
        curve = run.inputs.quality_points(label=run.name, color=color)
        if curve:
            curves.append(curve)
            strings.add(str(run.inputs.quality_curve.get("strings")))
    if not curves:
        words = "moesaic curve RUN scores the checkpoints of a run."
        return tag("figure", tag("figcaption", QUALITY_TITLE), tag("p", words, class_="gap"))
    chart = line_chart(curves, title=QUALITY_TITLE, from_zero=True)
    if len(strings) == 1:
        return chart
    return join_html([tag("div", chart, tag("p", "Not on the same strings.", class_="gap"))])
