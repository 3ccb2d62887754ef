"""The part of the report on what routers learn: what they read, when they settle, who is left out.

The three findings of OpenMoE (arXiv:2402.01739), looked for in this run.

Letters: L layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesaic.moe.agreement import RoutingAgreement
from moesaic.report.charts import IntervalDot, ChartFrame, ChartSeries, dot_chart, line_chart
from moesaic.report.html import Html, join_html, html_table, tag
from moesaic.report.inputs import ReportInputs

_PREDICTOR_LABELS = ("which token it is", "its position in the row", "a token at random")
_PREDICTORS = ("token", "position", "token_by_chance")
_WIDE_FRAME = ChartFrame(left=60)  # room for the word "position"
_MIN_BIN_SHARE = 0.02  # of all edges: fewer say little about a rate
_MAX_CURVES = 5  # more layers than this are shown by their median and extremes


def insight_section(inputs: ReportInputs) -> Html:
    """Return the three plots, each with its words; what is missing is said in its place."""
    layers: dict[str, Any] = inputs.insight.get("layers") or {}
    parts: list[Html] = []
    if layers:
        parts += [_uncertainty_chart(layers), _typical_tokens(layers)]
    else:
        gap = inputs.gaps.get("insight.json", "No token was routed to an expert.")
        words = "An evaluation of a model with experts writes it: moesaic eval RUN."
        parts.append(tag("p", f"{gap} {words}", class_="gap"))
    charts = [_agreement_chart(inputs), *_drop_charts(layers)]
    parts.append(tag("div", *charts, class_="charts"))
    return join_html(parts)


def _uncertainty_chart(layers: dict[str, Any]) -> Html:
    rows = []
    for name, layer in layers.items():
        shares = [float(layer["uncertainty"][known]) for known in _PREDICTORS]
        rows.append((name, [IntervalDot(share, share, share) for share in shares]))
    chart = dot_chart(
        rows,
        systems=_PREDICTOR_LABELS,
        title="Uncertainty left about a token's expert, knowing ...",
        note="1: no idea, 0: certain",
        digits=2,
        max_value=1.0,
    )
    most = {known: max(layers, key=lambda n: _explained_share(layers[n], known)) for known in _PREDICTORS[:2]}
    told = [
        f"its {known} explains up to {_explained_share(layers[name], known):.0%} of it (in {name})"
        for known, name in most.items()
    ]
    words = (
        "What does a router go by? Of the uncertainty about the expert that is left when the same "
        f"labels are dealt out at random, {' and '.join(told)}. Measured on held-out text."
    )
    return join_html([tag("p", words), chart])


def _explained_share(layer: dict[str, Any], known: str) -> float:
    by_chance = float(layer["uncertainty"][f"{known}_by_chance"])
    return max(0.0, 1 - float(layer["uncertainty"][known]) / by_chance) if by_chance else 0.0


def _typical_tokens(layers: dict[str, Any]) -> Html:
    tables = []
    for name, layer in layers.items():
        work = layer["experts"] - layer["spare"]
        rows = [
            [f"expert {e}" if e < work else f"spare {e}", _token_chips(texts)]
            for e, texts in enumerate(layer["typical"])
        ]
        head = ["expert", "tokens that go there far more often than chance would send them"]
        tables.append(html_table(head, rows=rows, caption=f"Tokens of the experts of {name}"))
    shown = tag("div", *tables, class_="own")
    return tag("details", tag("summary", "Each expert's own tokens"), shown, class_="quiet")


def _token_chips(texts: Sequence[str]) -> Html:
    return join_html(
        child
        for text in texts
        for child in (tag("code", text.replace(" ", "\u2423"), class_="token"), " ")
    )


def _agreement_chart(inputs: ReportInputs) -> Html:
    title = "Edges that are as at the end, on held-out text"
    if len(inputs.agreement_by_step) < 2:
        gap = inputs.gaps.get("learning", "The routing of one step alone was kept.")
        words = (
            "Training keeps it every log.probe_every steps; from the checkpoints that are left, "
            "moesaic report RUN --checkpoints makes it."
        )
        return tag("figure", tag("figcaption", title), tag("p", f"{gap} {words}", class_="gap"))
    steps = [float(step) for step, _ in inputs.agreement_by_step]
    told = [agreement for _, agreement in inputs.agreement_by_step]
    curves = [ChartSeries(n, steps, y, i) for i, (n, y) in enumerate(_agreement_curves(told).items())]
    chart = line_chart(curves, title=title, from_zero=True)
    early = next(i for i, step in enumerate(steps) if step >= steps[-1] / 5)
    words = (
        f"At step {steps[early]:,.0f} of {steps[-1]:,.0f}, {told[early].edges:.0%} of the edges, "
        f"averaged over the layers, were those of the end; at step {steps[0]:,.0f}, "
        f"{told[0].edges:.0%}."
    )
    return tag("div", chart, tag("p", words, class_="soft"))


def _agreement_curves(told: Sequence[RoutingAgreement]) -> dict[str, list[float]]:
    by_layer = {x.layer: [a.layers[i].edges for a in told] for i, x in enumerate(told[0].layers)}
    if len(by_layer) <= _MAX_CURVES:
        return by_layer
    values = np.array(list(by_layer.values()))  # [L, steps]
    median, low, high = np.median(values, 0), values.min(0), values.max(0)
    return {
        "median layer": median.tolist(),
        "least settled layer": low.tolist(),
        "most settled layer": high.tolist(),
    }


def _drop_charts(layers: dict[str, Any]) -> list[Html]:
    """Drop rates by position: as recorded where there are any, else what a limit would do."""
    if any(sum(x["positions"]["dropped"]) for x in layers.values()):
        curves = _drop_rates(layers, ("dropped", "dropped"))
        return [
            line_chart(
                curves, title="Share of edges dropped", from_zero=True, x_label="position", frame=_WIDE_FRAME
            )
        ]
    if not layers:
        return []
    curves = _drop_rates(layers, ("first_come", "first come"), ("at_random", "at random"))
    chart = line_chart(
        curves,
        title="If each row had room for its fair share alone: edges dropped",
        from_zero=True,
        x_label="position",
        frame=_WIDE_FRAME,
    )
    words = (
        "Nothing was dropped here. This is what would be, were each row's edges a group with a "
        "capacity factor of 1, and room given first come, first served, or at random."
    )
    return [tag("div", chart, tag("p", words, class_="soft"))]


def _drop_rates(layers: dict[str, Any], *wanted: tuple[str, str]) -> list[ChartSeries]:
    """Curves of each side, over all of its layers; a side keeps its colour."""
    sides = list(dict.fromkeys(name.partition(".")[0] for name in layers))
    curves = []
    for tint, side in enumerate(sides):
        own = [x["positions"] for name, x in layers.items() if name.startswith(side)]
        asked = np.sum([x["asked"] for x in own], axis=0)
        for dash, (key, label) in enumerate(wanted):
            x, y = _bin_rates(asked, np.sum([x[key] for x in own], axis=0))
            curves.append(ChartSeries(f"{side}, {label}", x, y, tint, dash))
    return curves


def _bin_rates(asked: np.ndarray, lost: np.ndarray) -> tuple[list[float], list[float]]:
    """Rates at mean positions, of neighbouring positions that have enough edges together."""
    x, y, start = [], [], 0
    enough = max(1.0, _MIN_BIN_SHARE * float(asked.sum()))
    for end in range(1, len(asked) + 1):
        size = float(asked[start:end].sum())
        if size >= enough:
            x.append(float((np.arange(start, end) * asked[start:end]).sum()) / size)
            y.append(float(lost[start:end].sum()) / size)
            start = end
    return x, y
