"""The part of the report on routing: who goes where, and whether the routers are healthy.

The part of the report on what routers learn: what they read, when they settle, who is left out.

The three findings of OpenMoE (arXiv:2402.01739), looked for in this run.

Letters: L layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesaic.moe.routing_agreement import RoutingAgreement
from moesaic.monitor.expert_usage import LayerUsage, RecordedUsage
from moesaic.monitor.health_rules import RouterSettings
from moesaic.monitor.router_health import RouterHealthMonitor
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

_MAPS_WIDTH = (
    720  # pixels for the cells of all layers beside each other, where they are not too many
)


_NOT_LOAD_BALANCING = ("RouterZLoss", "EntropyBalance")  # terms that do not even the experts' load


_HEALTH_METRICS = (
    ("moe/max_vio", "Busiest expert: load above the mean, as a multiple"),
    ("moe/load_entropy", "Evenness of load (entropy; 1 is even)"),
    ("moe/dead_experts", "Experts without a token"),
    ("moe/drop_frac", "Share of tokens dropped"),
)


def atlas_section(inputs: ReportInputs) -> Html:
    """Return the heat map of each layer beside the tree of languages, or the gap in its place."""
    used = inputs.usage
    if used is None:
        gap = inputs.gaps.get("usage.json", "No token was routed to an expert.")
        return tag("p", f"{gap} Training a model with experts writes it.", class_="gap")
    layers = [layer for layer in used.layers if layer.counts.sum()]
    heard = [g for g in range(len(used.languages)) if any(x.counts[:, g].sum() for x in layers)]
    names = [language_name(code) for code in used.languages]
    tree = average_linkage(_mean_routing_distance(layers, heard))
    reach = choose_max_log2_ratio(
        [expert_share_by_language(layer.counts)[:, heard] for layer in layers]
    )
    rows = [heard[i] for i in tree.leaves]
    cell = int(np.clip(_MAPS_WIDTH / sum(layer.num_experts for layer in layers), 14, 44))
    maps, buttons = [], [_layer_button("all layers", layer="", pressed="true")]
    for number, layer in enumerate(layers):
        drawn = ExpertHeatMap(
            layer.layer, expert_share_by_language(layer.counts), rows, names, reach, cell
        ).render()
        maps.append(
            tag(
                "div",
                tag("h4", layer.layer),
                drawn,
                _layer_details(layer, used),
                class_="layer on",
                data_rows="\t".join(names[g] for g in rows),
                id=f"layer-{number}",
            )
        )
        buttons.append(_layer_button(layer.layer, layer=f"layer-{number}", pressed="false"))
    words = (
        "How much each language uses each expert, against a fair share. Languages that are routed "
        "alike stand together; the tree's forks are further left the less alike they are."
    )
    return join_html(
        [
            tag("p", words),
            tag("div", *buttons, class_="choices", role="group", aria_label="Layer"),
            heat_map_legend(reach),
            tag(
                "div",
                tag("div", dendrogram(tree, names=[names[g] for g in heard]), class_="fixed"),
                tag("div", *maps, class_="scroll maps many", tabindex=0),
                class_="atlas",
            ),
        ]
    )


def _layer_button(words: str, *, layer: str, pressed: str) -> Html:
    return tag("button", words, type="button", aria_pressed=pressed, data_layer=layer)


def health_section(inputs: ReportInputs) -> Html:
    """Return the routers' vital signs over time and the doctor's words on the whole run."""
    curves = [(inputs.curve(name, label=title), title) for name, title in _HEALTH_METRICS]
    told = [(c, title) for c, title in curves if c]
    charts = [line_chart([c], title=title, from_zero=True) for c, title in told if any(c.y)]
    never = [
        tag("p", f"{title}: none at any step.", class_="soft") for c, title in told if not any(c.y)
    ]
    drawn = (
        join_html([tag("div", *charts, class_="charts") if charts else None, *never])
        if told
        else None
    )
    if inputs.usage is None:
        return drawn or tag("p", "No routing was recorded.", class_="gap")
    doctor = RouterHealthMonitor(router_settings(inputs), patience=1)
    findings = doctor.check_interval(inputs.usage.layers)
    if not findings:
        words = tag(
            "p", "Over the whole run, the router doctor finds nothing wrong.", class_="good"
        )
    else:
        items = [
            tag(
                "li",
                tag("b", f"Layer {f.layer} {f.text}."),
                f" Likely cause: {f.cause}. Try: {f.advice}.",
            )
            for f in findings
        ]
        words = tag("ul", *items, class_="findings")
    return join_html([words, drawn])


def router_settings(inputs: ReportInputs) -> RouterSettings:
    """Read from the config what the doctor's causes and advice depend on."""
    moe: dict[str, Any] = (inputs.config.get("model") or {}).get("moe") or {}
    select, limit = moe.get("select") or {}, moe.get("limit") or {}
    terms = {str(term.get("kind")): term for term in moe.get("balance") or ()}
    weights = {kind: float(term.get("weight") or 0) for kind, term in terms.items()}
    evening = {kind: w for kind, w in weights.items() if w and kind not in _NOT_LOAD_BALANCING}
    return RouterSettings(
        languages=inputs.usage.languages if inputs.usage else (),
        top_k=int(select.get("k") or (2 if select.get("kind") == "Top2" else 1)),
        balance_weight=sum(evening.values()),
        z_weight=weights.get("RouterZLoss", 0.0),
        capacity_factor=limit.get("factor"),
        bias_rate=float(terms.get("BiasUpdate", {}).get("rate") or 0),
        balance=max(evening, key=evening.__getitem__, default="SwitchBalance"),
    )


def _mean_routing_distance(layers: Sequence[LayerUsage], heard: Sequence[int]) -> np.ndarray:
    """Average over the layers; layers may have different numbers of experts."""
    return np.mean([routing_distance(x.counts[None][:, :, heard]) for x in layers], axis=0)


def _layer_details(layer: LayerUsage, used: RecordedUsage) -> Html:
    found = measure_specialization(layer.counts)
    most = np.log2(min(layer.num_experts, max(int((layer.counts.sum(0) > 0).sum()), 1)))
    words = (
        f"Knowing the language tells {found.mutual_information:.2f} bits about the expert, of "
        f"{most:.1f} at most. Evenness of load: {found.load_entropy:.2f} of 1."
    )
    share = layer.load / max(layer.load.sum(), 1)
    rows = [
        [
            f"expert {e}" if e < layer.computing_load.size else f"null expert {e}",
            f"{share[e]:.1%}",
            ", ".join(f"{language_name(used.languages[g])} {ratio:.1f}×" for g, ratio in typical),
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
    most = {
        known: max(layers, key=lambda n: _explained_share(layers[n], known))
        for known in _PREDICTORS[:2]
    }
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
        work = layer["experts"] - layer["null_experts"]
        rows = [
            [f"expert {e}" if e < work else f"null expert {e}", _token_chips(texts)]
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
            "Training keeps it every log.routing_probe_every steps; from the checkpoints that are left, "
            "moesaic report RUN --checkpoints makes it."
        )
        return tag("figure", tag("figcaption", title), tag("p", f"{gap} {words}", class_="gap"))
    steps = [float(step) for step, _ in inputs.agreement_by_step]
    told = [agreement for _, agreement in inputs.agreement_by_step]
    curves = [
        ChartSeries(n, steps, y, i) for i, (n, y) in enumerate(_agreement_curves(told).items())
    ]
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
                curves,
                title="Share of edges dropped",
                from_zero=True,
                x_label="position",
                frame=_WIDE_FRAME,
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
