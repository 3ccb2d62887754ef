"""The part of the report on routing: who goes where, and whether the routers are healthy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesaic.observe.affinity import routing_distance, measure_specialization, expert_share_by_language
from moesaic.observe.doctor import RouterHealthMonitor
from moesaic.observe.layer_counts import LayerUsage
from moesaic.observe.signs import RouterSettings
from moesaic.observe.usage import RecordedUsage
from moesaic.report.charts import line_chart
from moesaic.report.cluster import average_linkage
from moesaic.report.heat import ExpertHeatMap, dendrogram, heat_map_legend, choose_max_log2_ratio
from moesaic.report.html import Html, join_html, html_table, tag
from moesaic.report.inputs import ReportInputs, language_name

_MAPS_WIDTH = 720  # pixels for the cells of all layers beside each other, where they are not too many
_NOT_LOAD_BALANCING = ("RouterZ", "EntropyBalance")  # terms that do not even the experts' load
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
    reach = choose_max_log2_ratio([expert_share_by_language(layer.counts)[:, heard] for layer in layers])
    rows = [heard[i] for i in tree.leaves]
    cell = int(np.clip(_MAPS_WIDTH / sum(layer.num_experts for layer in layers), 14, 44))
    maps, buttons = [], [_layer_button("all layers", layer="", pressed="true")]
    for number, layer in enumerate(layers):
        drawn = ExpertHeatMap(layer.layer, expert_share_by_language(layer.counts), rows, names, reach, cell).render()
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
        join_html([tag("div", *charts, class_="charts") if charts else None, *never]) if told else None
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
        z_weight=weights.get("RouterZ", 0.0),
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
            f"expert {e}" if e < layer.computing_load.size else f"spare {e}",
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
