"""The gallery page: a table of training runs, one per routing rule, and a picture of each."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.units import show_count
from moesaic.monitor.specialization import expert_share_by_language
from moesaic.report.charts import ChartFrame, ChartSeries, line_chart
from moesaic.report.heat_map import ROW_HEIGHT, ExpertHeatMap
from moesaic.report.html import Html, join_html, tag
from moesaic.report.palette import css_variables
from moesaic.report.report_inputs import language_name

PICTURES = Path("docs") / "pictures" / "gallery"
LOSS = ChartFrame(width=420, height=210, left=44, right=14, top=12, bottom=26)
NAMES = 70  # pixels for the names of languages
STYLE = """
text{font:12px system-ui,sans-serif;fill:var(--ink)} .axis{font-size:11px;fill:var(--faint)}
.title{font-weight:600} .grid{stroke:var(--line)} .curve{fill:none;stroke-width:1.9}
.cursor{display:none} .more{fill:var(--blue)} .less{fill:var(--red)} .ground{fill:var(--wash)}
.page{fill:var(--card)}
"""

INTRO = """\
# Gallery of routing rules

One small training run per routing rule, with the same text, steps and seed. Written by
`python benchmarks/gallery.py`, numbers in `benchmarks/results/gallery.json`. The runs are short and
have one seed each: they show that a rule trains, not which rule is better.

Loss is in nats per token: the first and the last row of training without auxiliary losses, and the
final loss on held-out text. Evenness is the load entropy of the least balanced layer (1 is
balanced), busiest the maximum violation of its most loaded expert (load over mean load, minus 1),
both on held-out text and over true experts. The last column is the router health of the run.

"""
HEAD = (
    "rule", "parameters", "active", "steps", "loss: first", "last", "held-out", "evenness",
    "busiest", "dropped", "s", "health",
)  # fmt: skip


def write_page(results: Mapping[str, Any], *, root: Path) -> str:
    """Write the page and its pictures under ``root``; return a summary."""
    done = {n: r for n, r in results["rules"].items() if "skipped" not in r}
    skipped = {n: r for n, r in results["rules"].items() if "skipped" in r}
    folder = root / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    parts = [INTRO, _table(done), _machine(results)]
    if skipped:
        parts.append("\nNot in this version, or not for this model:\n")
        parts += [f"- `{n}` ({r['what']}): {r['skipped'][:120]}" for n, r in skipped.items()]
        parts.append("")
    for name, rule in done.items():
        (folder / f"{name}.svg").write_text(picture(rule), encoding="utf-8")
        parts.append(f"\n## {name}\n\n{rule['what'][0].upper()}{rule['what'][1:]}.\n")
        parts.append(f"![Loss, and experts by language, of {name}](pictures/gallery/{name}.svg)\n")
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(parts))
    (root / "docs" / "gallery.md").write_text(text, encoding="utf-8")
    return f"docs/gallery.md: {len(done)} rules, {len(skipped)} skipped"


def picture(rule: Mapping[str, Any]) -> str:
    """Return one rule's SVG: the loss to the left, its last MoE layer's use to the right."""
    curves = [
        ChartSeries(label, [x for x, _ in rule[key]], [y for _, y in rule[key]], tint, tint)
        for tint, (key, label) in enumerate((("train", "training"), ("valid", "held-out")))
    ]
    loss = _placed(line_chart(curves, title="Loss, nats per token", frame=LOSS), 0, 22, frame=LOSS)
    title = tag("text", "loss: line training, dashes held-out", x=LOSS.left, y=16, class_="title")
    heat, width, height = _heat(rule)
    size = (LOSS.width + 16 + width, max(LOSS.height + 24, height + 8))
    body = join_html([tag("rect", width=size[0], height=size[1], class_="page"), title, loss, heat])
    style = Html(f"<style>{css_variables()}{STYLE}</style>")
    drawn = tag(
        "svg",
        style,
        body,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {size[0]} {size[1]}",
        width=size[0],
        height=size[1],
        role="img",
    )
    return f"{drawn}\n"


def _heat(rule: Mapping[str, Any]) -> tuple[Html, int, int]:
    """The last layer's heat map with the languages' names, and its size."""
    if not rule["layers"]:
        words = tag("text", "no routes are recorded", x=LOSS.width + 16, y=60, class_="axis")
        return words, 240, 80
    layer, found = list(rule["layers"].items())[-1]
    counts = np.array(found["counts"])
    rows = np.flatnonzero(counts.sum(0) > 0).tolist()
    names = [language_name(code) for code in rule["languages"]]
    cell = max(14, min(34, 300 // counts.shape[0]))
    heat = ExpertHeatMap(layer, expert_share_by_language(counts), rows, names, 2.0, cell)
    left, width = LOSS.width + 16, counts.shape[0] * cell
    work = counts.shape[0] - found["null_experts"]
    idle = f" ({work} on: null experts)" if found["null_experts"] else ""
    title = f"{layer}: use of experts against a fair share{idle}"
    labels = [
        tag(
            "text",
            names[g],
            x=left + NAMES - 6,
            y=22 + (i + 1.5) * ROW_HEIGHT + 4,
            text_anchor="end",
        )
        for i, g in enumerate(rows)
    ]
    drawn = tag("g", heat.render(), transform=f"translate({left + NAMES} 22)")
    heading = tag("text", title, x=left, y=16, class_="title")
    width_needed = max(NAMES + width + 8, 7 * len(title))
    return join_html([heading, *labels, drawn]), width_needed, 22 + (len(rows) + 1) * ROW_HEIGHT


def _placed(chart: Html, x: int, y: int, *, frame: ChartFrame) -> Html:
    """A chart's SVG out of its figure, at a place of its own."""
    found = re.search(r"<svg (?=[^>]*class=\"lines\").*</svg>", chart.text, re.S)
    assert found is not None
    place = f'<svg x="{x}" y="{y}" width="{frame.width}" height="{frame.height}" '
    return Html(found[0].replace("<svg ", place, 1))


def _table(done: Mapping[str, Any]) -> str:
    lines = [f"| {' | '.join(HEAD)} |", f"|---{'|---:' * (len(HEAD) - 2)}|---|"]
    for name, rule in done.items():
        load = rule["load"]
        cells = (
            f"[{name}](#{name})",
            show_count(rule["parameters"]),
            show_count(rule["active"]),
            f"{rule['steps']:,}",
            f"{rule['train'][0][1]:.2f}",
            f"{rule['train'][-1][1]:.2f}",
            f"{rule['valid'][-1][1]:.2f}",
            f"{load['moe/load_entropy']:.2f}" if load else "-",
            f"{load['moe/max_vio']:.2f}" if load else "-",
            f"{load['moe/drop_frac']:.1%}" if load else "-",
            f"{rule['seconds']:.0f}",
            "; ".join(rule["findings"]) or "healthy",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _machine(results: Mapping[str, Any]) -> str:
    machine = results.get("machine")
    if not machine:
        return ""
    return (
        f"\n{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, commit "
        f"`{results.get('commit', '')}`, {results.get('date', '')}. Seconds are of a busy machine "
        f"where the load was above 2 (it was {machine['load_before']:.1f} at the end).\n"
    )
