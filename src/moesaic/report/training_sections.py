"""Report sections on training (losses, speed) and on the run (phases, config, versions)."""

import math
from typing import Any

from moesaic.core.units import show_count, show_seconds
from moesaic.report.charts import ChartSeries, bar_chart, line_chart, stacked_bar
from moesaic.report.html import Html, html_table, join_html, tag
from moesaic.report.report_inputs import QUALITY_TITLE, ReportInputs, language_name, to_text


def training_section(inputs: ReportInputs) -> Html:
    """Return loss curves per task, the last losses per language, and throughput."""
    if not inputs.metrics:
        gap = inputs.gaps.get("metrics.jsonl", "metrics.jsonl has no rows.")
        return tag("p", f"{gap} Training writes it.", class_="gap")
    drawn = [
        line_chart(_loss_curves(inputs), title="Loss, nats per token"),
        _quality_chart(inputs),
        _loss_by_language(inputs),
        _metric_chart(inputs, "perf/tokens_per_s", title="Tokens per second"),
        _metric_chart(inputs, "train/lr", title="Learning rate"),
        _metric_chart(inputs, "train/grad_norm", title="Gradient norm, before clipping"),
        _metric_chart(inputs, "perf/rolled_back", title="Share of steps rolled back"),
        _router_loss_chart(inputs),
    ]
    return join_html([tag("div", *(d for d in drawn if d), class_="charts"), _data_wait(inputs)])


def run_section(inputs: ReportInputs) -> Html:
    """Return the time of each phase, counts, the whole config, and versions."""
    summary = inputs.summary
    parts: list[Html | None] = []
    seconds = {k: v for k, v in (summary.get("seconds") or {}).items() if _is_finite_number(v)}
    if seconds:
        total = show_seconds(sum(seconds.values()))
        cuts = [(name, float(s), show_seconds(s)) for name, s in seconds.items()]
        parts.append(stacked_bar(cuts, title=f"Time by phase: {total} in all"))
    facts = {**(summary.get("counts") or {}), **(summary.get("versions") or {})}
    if facts:
        rows = [[name.replace("_", " "), _format_value(value)] for name, value in facts.items()]
        parts.append(html_table(["what", "value"], rows=rows, caption="Counts and versions"))
    if inputs.config_text:
        text = tag("pre", tag("code", inputs.config_text), tabindex=0)
        parts.append(tag("details", tag("summary", "The whole config"), text, class_="quiet"))
    for name, gap in inputs.gaps.items():
        parts.append(tag("p", gap, class_="gap", data_file=name))
    return join_html(part for part in parts if part)


def latest_value(inputs: ReportInputs, name: str) -> float | None:
    """Return a metric's newest value, if it has a finite one."""
    found = inputs.metrics.get(name)
    values = [v for v in found.y if math.isfinite(v)] if found else []
    return values[-1] if values else None


def _loss_curves(inputs: ReportInputs) -> list[ChartSeries]:
    """Return train and (dashed) validation curves, in all and per task, one color per task."""
    tasks, _ = inputs.tasks_and_languages("train/loss/")
    named = [("", "all")] if len(tasks) != 1 else []
    named += [(f"/{task}", task) for task in tasks]
    curves = []
    for color, (end, label) in enumerate(named or [("", "all")]):
        for dash, (prefix, kind) in enumerate((("train", "train"), ("valid", "validation"))):
            found = inputs.curve(
                f"{prefix}/loss{end}", label=f"{label}, {kind}", color=color, dash=dash
            )
            curves += [found] if found else []
    return curves


def _quality_chart(inputs: ReportInputs) -> Html | None:
    """Return chrF++ at each scored checkpoint, with the baselines."""
    model = inputs.quality_points(label="model")
    if model is None:
        return None
    curves, ends = [model], [model.x[0], model.x[-1]]
    for color, (name, found) in enumerate(inputs.quality_curve["baselines"].items(), start=1):
        curves.append(ChartSeries(name, ends, [found["score"]] * 2, color, 1))
    return line_chart(curves, title=QUALITY_TITLE, from_zero=True)


def _loss_by_language(inputs: ReportInputs) -> Html | None:
    for prefix, kind in (("valid/loss/", "validation"), ("train/loss/", "training")):
        _, languages = inputs.tasks_and_languages(prefix)
        found = [(language_name(code), latest_value(inputs, prefix + code)) for code in languages]
        rows = sorted((v, name) for name, v in found if v is not None)
        if rows:
            title = f"Last {kind} loss by target language"
            return bar_chart([(name, value) for value, name in rows], title=title)
    return None


def _router_loss_chart(inputs: ReportInputs) -> Html | None:
    names = [n for n in inputs.metrics if n.startswith("train/loss_")]
    curves = [
        inputs.curve(n, label=n.removeprefix("train/loss_"), color=i) for i, n in enumerate(names)
    ]
    kept = [curve for curve in curves if curve]
    return line_chart(kept, title="Router losses, weighted", from_zero=True) if kept else None


def _metric_chart(inputs: ReportInputs, name: str, *, title: str) -> Html | None:
    curve = inputs.curve(name, label=title)
    return line_chart([curve], title=title, from_zero=True) if curve else None


def _data_wait(inputs: ReportInputs) -> Html | None:
    data, step = latest_value(inputs, "time/data_ms"), latest_value(inputs, "perf/step_ms")
    if data is None or not step:
        return None
    return tag("p", f"Of a step's {step:.0f} ms, {data:.1f} ms were spent waiting for data.")


def _format_value(value: Any) -> str:
    if _is_finite_number(value) and abs(value) >= 10_000:
        return f"{value:,.0f} ({show_count(value)})"
    return f"{value:,}" if _is_finite_number(value) else to_text(value)


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
