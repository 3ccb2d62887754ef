"""Report sections on routing: the routing atlas, router health, and what routers base choices on.

The last one shows the three findings of OpenMoE (arXiv:2402.01739) for this run: whether the expert
depends on the token id or the position, when routing settles, and which positions are dropped.

Letters: L layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesaic.moe.routing_agreement import RoutingAgreement
from moesaic.monitor.expert_usage import LayerUsage, RecordedUsage
from moesaic.monitor.health_record import RecordedFinding
from moesaic.monitor.specialization import (
    expert_share_by_language,
    measure_specialization,
    routing_distance,
)
from moesaic.report.charts import ChartFrame, ChartSeries, IntervalDot, dot_chart, line_chart
from moesaic.report.heat_map import (
    ExpertHeatMap,
    average_linkage,
    choose_max_log2_ratio,
    dendrogram,
    heat_map_legend,
)
from moesaic.report.html import Html, html_table, join_html, tag
from moesaic.report.report_inputs import ReportInputs, language_name

_MAPS_WIDTH = 720  # pixels for the cells of all layers side by side, unless they are too many
_PREDICTOR_LABELS = ("token id", "position in the row", "shuffled token id")
_PREDICTORS = ("token", "position", "token_by_chance")
_WIDE_FRAME = ChartFrame(left=60)  # for the label "position"
_MIN_BIN_SHARE = 0.02  # of all edges: rates of fewer are mostly chance
_MAX_CURVES = 5  # more layers are shown by their median and extremes
_HEALTH_METRICS = (
    ("moe/max_vio", "Maximum load above the mean load, as a multiple (max violation)"),
    ("moe/load_entropy", "Load entropy (1 is balanced)"),
    ("moe/dead_experts", "Experts without a token"),
    ("moe/drop_frac", "Share of tokens dropped"),
)


def atlas_section(inputs: ReportInputs) -> Html:
    """Return the heat map of each layer beside the language tree, or a note on what is missing."""
    usage = inputs.usage
    if usage is None:
        gap = inputs.gaps.get("usage.json", "No token was routed to an expert.")
        return tag("p", f"{gap} Training a model with experts writes it.", class_="gap")
    layers = [layer for layer in usage.layers if layer.counts.sum()]
    present = [g for g in range(len(usage.languages)) if any(x.counts[:, g].sum() for x in layers)]
    names = [language_name(code) for code in usage.languages]
    tree = average_linkage(_mean_routing_distance(layers, present))
    max_ratio = choose_max_log2_ratio(
        [expert_share_by_language(layer.counts)[:, present] for layer in layers]
    )
    rows = [present[i] for i in tree.leaves]
    cell = int(np.clip(_MAPS_WIDTH / sum(layer.num_experts for layer in layers), 14, 44))
    maps, buttons = [], [_layer_button("all layers", layer="", pressed="true")]
    for number, layer in enumerate(layers):
        share = expert_share_by_language(layer.counts)
        heat_map = ExpertHeatMap(layer.layer, share, rows, names, max_ratio, cell)
        maps.append(
            tag(
                "div",
                tag("h4", layer.layer),
                heat_map.render(),
                _layer_details(layer, usage),
                class_="layer on",
                data_rows="\t".join(names[g] for g in rows),
                id=f"layer-{number}",
            )
        )
        buttons.append(_layer_button(layer.layer, layer=f"layer-{number}", pressed="false"))
    words = (
        "Use of each expert by each language, relative to uniform routing. Languages with similar "
        "routing are next to each other; forks further left join less similar languages."
    )
    return join_html(
        [
            tag("p", words),
            tag("div", *buttons, class_="choices", role="group", aria_label="Layer"),
            heat_map_legend(max_ratio),
            tag(
                "div",
                tag("div", dendrogram(tree, names=[names[g] for g in present]), class_="fixed"),
                tag("div", *maps, class_="scroll maps many", tabindex=0),
                class_="atlas",
            ),
        ]
    )


def _layer_button(words: str, *, layer: str, pressed: str) -> Html:
    return tag("button", words, type="button", aria_pressed=pressed, data_layer=layer)


def health_section(inputs: ReportInputs) -> Html:
    """Return the load-balance metrics over time and the findings that training recorded."""
    curves = [(inputs.curve(name, label=title), title) for name, title in _HEALTH_METRICS]
    known = [(c, title) for c, title in curves if c]
    charts = [line_chart([c], title=title, from_zero=True) for c, title in known if any(c.y)]
    parts = [tag("div", *charts, class_="charts")] if charts else []
    parts += [
        tag("p", f"{title}: none at any step.", class_="soft") for c, title in known if not any(c.y)
    ]
    if inputs.health is None:
        gap = inputs.gaps.get("health.json", "No routing was recorded.")
        return join_html([tag("p", gap, class_="gap"), *parts])
    if not inputs.health:
        words = tag("p", "Training found nothing wrong with a router.", class_="good")
    else:
        words = tag("ul", *map(_finding_item, inputs.health), class_="findings")
    return join_html([words, *parts])


def _finding_item(recorded: RecordedFinding) -> Html:
    finding, last = recorded.finding, recorded.last_step
    until = "to the end" if last is None else f"to {last:,}"
    return tag(
        "li",
        tag("b", f"Steps {recorded.first_step:,} {until}: layer {finding.layer} {finding.text}."),
        f" Likely cause: {finding.cause}. Try: {finding.advice}.",
    )


def _mean_routing_distance(layers: Sequence[LayerUsage], present: Sequence[int]) -> np.ndarray:
    """Average over the layers; layers may have different numbers of experts."""
    return np.mean([routing_distance(x.counts[None][:, :, present]) for x in layers], axis=0)


def _layer_details(layer: LayerUsage, usage: RecordedUsage) -> Html:
    found = measure_specialization(layer.counts)
    most = np.log2(min(layer.num_experts, max(int((layer.counts.sum(0) > 0).sum()), 1)))
    words = (
        f"Mutual information of language and expert: {found.mutual_information:.2f} bits, of "
        f"{most:.1f} at most. Load entropy: {found.load_entropy:.2f} of 1."
    )
    share = layer.load / max(layer.load.sum(), 1)
    rows = [
        [
            f"expert {e}" if e < layer.computing_load.size else f"null expert {e}",
            f"{share[e]:.1%}",
            ", ".join(f"{language_name(usage.languages[g])} {ratio:.1f}×" for g, ratio in typical),
        ]
        for e, typical in enumerate(found.top_languages)
    ]
    head = ["expert", "share of tokens", "used most, relative to the average language"]
    inside = html_table(head, rows=rows, caption=f"Experts of {layer.layer}")
    return join_html(
        [
            tag("p", words, class_="soft"),
            tag("details", tag("summary", "as a table"), inside, class_="quiet"),
        ]
    )


def insight_section(inputs: ReportInputs) -> Html:
    """Return the three charts with their explanations, or notes on what is missing."""
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
        title="Uncertainty about a token's expert (conditional entropy), given its ...",
        note="1: not predictable, 0: determined",
        digits=2,
        max_value=1.0,
    )
    most = {
        known: max(layers, key=lambda n: _explained_share(layers[n], known))
        for known in _PREDICTORS[:2]
    }
    explained = [
        f"its {known} explains up to {_explained_share(layers[name], known):.0%} of it (in {name})"
        for known, name in most.items()
    ]
    words = (
        "What routers base their choice on. Of the uncertainty about a token's expert that is left "
        f"for shuffled labels, {' and '.join(explained)}. Measured on held-out text."
    )
    return join_html([tag("p", words), chart])


def _explained_share(layer: dict[str, Any], known: str) -> float:
    by_chance = float(layer["uncertainty"][f"{known}_by_chance"])
    return max(0.0, 1 - float(layer["uncertainty"][known]) / by_chance) if by_chance else 0.0


def _typical_tokens(layers: dict[str, Any]) -> Html:
    tables = []
    for name, layer in layers.items():
        work = layer["experts"] - layer["null_experts"]
        rows = [
            [f"expert {e}" if e < work else f"null expert {e}", _token_chips(texts)]
            for e, texts in enumerate(layer["typical"])
        ]
        head = ["expert", "tokens that are routed there far more often than by chance"]
        tables.append(html_table(head, rows=rows, caption=f"Tokens of the experts of {name}"))
    shown = tag("div", *tables, class_="own")
    return tag(
        "details", tag("summary", "Characteristic tokens of each expert"), shown, class_="quiet"
    )


def _token_chips(texts: Sequence[str]) -> Html:
    return join_html(
        child
        for text in texts
        for child in (tag("code", text.replace(" ", "\u2423"), class_="token"), " ")
    )


def _agreement_chart(inputs: ReportInputs) -> Html:
    title = "Share of edges as at the end of training, on held-out text"
    if len(inputs.agreement_by_step) < 2:
        gap = inputs.gaps.get("learning", "Only the routing of one step is stored.")
        words = (
            "Training stores it every log.routing_probe_every steps; moesaic report RUN "
            "--checkpoints computes it from the checkpoints."
        )
        return tag("figure", tag("figcaption", title), tag("p", f"{gap} {words}", class_="gap"))
    steps = [float(step) for step, _ in inputs.agreement_by_step]
    agreements = [agreement for _, agreement in inputs.agreement_by_step]
    curves = [
        ChartSeries(n, steps, y, i)
        for i, (n, y) in enumerate(_agreement_curves(agreements).items())
    ]
    chart = line_chart(curves, title=title, from_zero=True)
    early = next(i for i, step in enumerate(steps) if step >= steps[-1] / 5)
    words = (
        f"At step {steps[early]:,.0f} of {steps[-1]:,.0f}, {agreements[early].edges:.0%} of the "
        "edges, averaged over the layers, are those of the last step; at step "
        f"{steps[0]:,.0f}, {agreements[0].edges:.0%}."
    )
    return tag("div", chart, tag("p", words, class_="soft"))


def _agreement_curves(agreements: Sequence[RoutingAgreement]) -> dict[str, list[float]]:
    by_layer = {
        x.layer: [a.layers[i].edges for a in agreements] for i, x in enumerate(agreements[0].layers)
    }
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
    """Return drop rates by position: recorded ones, or else those of a simulated capacity limit."""
    if not layers:
        return []
    dropped = any(sum(x["positions"]["dropped"]) for x in layers.values())
    if dropped:
        title = "Share of edges dropped"
        curves = _drop_rates(layers, ("dropped", "dropped"))
    else:
        title = "Simulated share of edges dropped, with a capacity factor of 1 per row"
        curves = _drop_rates(layers, ("first_come", "first come"), ("at_random", "at random"))
    chart = line_chart(curves, title=title, from_zero=True, x_label="position", frame=_WIDE_FRAME)
    if dropped:
        return [chart]
    words = (
        "Nothing was dropped in this run. The curves are those of a simulated capacity limit, with "
        "drop priority by position (first come) or at random."
    )
    return [tag("div", chart, tag("p", words, class_="soft"))]


def _drop_rates(layers: dict[str, Any], *kinds: tuple[str, str]) -> list[ChartSeries]:
    """Return the curves of encoder and decoder, each over all of its layers, in one color each."""
    sides = list(dict.fromkeys(name.partition(".")[0] for name in layers))
    curves = []
    for color, side in enumerate(sides):
        positions = [x["positions"] for name, x in layers.items() if name.startswith(side)]
        requested = np.sum([x["asked"] for x in positions], axis=0)
        for dash, (key, label) in enumerate(kinds):
            x, y = _bin_rates(requested, np.sum([x[key] for x in positions], axis=0))
            curves.append(ChartSeries(f"{side}, {label}", x, y, color, dash))
    return curves


def _bin_rates(requested: np.ndarray, dropped: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean positions and drop rates of bins of neighbouring positions with enough edges."""
    x, y, start = [], [], 0
    min_size = max(1.0, _MIN_BIN_SHARE * float(requested.sum()))
    for end in range(1, len(requested) + 1):
        size = float(requested[start:end].sum())
        if size >= min_size:
            x.append(float((np.arange(start, end) * requested[start:end]).sum()) / size)
            y.append(float(dropped[start:end].sum()) / size)
            start = end
    return x, y
