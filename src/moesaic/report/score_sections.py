"""Report sections on quality: verdict, scores, and sample translations with their experts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesaic.core.errors import listed
from moesaic.report.charts import IntervalDot, dot_chart
from moesaic.report.html import Html, HtmlChild, html_table, join_html, tag
from moesaic.report.report_inputs import ReportInputs, language_name, lookup, to_text

_SYSTEM_NAMES = {"model": "model", "copy": "copying the source", "memory": "translation memory"}
METRIC_NAMES = {"chrf": "chrF++", "bleu": "BLEU"}
_GROUP_NAMES = {
    "seen": "rows that were trained on",
    "copied": "rows whose reference equals the source",
    "marked": "rows with placeholders, tags or URLs",
}
_VERDICT_MARKS = {
    "better": ("▲", "better"),
    "worse": ("▼", "worse"),
    "unclear": ("≈", "level: the interval contains zero"),
}
_MAX_TRACES = 60  # expert tables: more would make the file large


def verdict_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return sentences on how many languages the first system is better, worse and level in."""
    first = str((summary.get("systems") or ["model"])[0])
    words = []
    for other, found in (summary.get("verdicts") or {}).items():
        name = _with_article(str(_SYSTEM_NAMES.get(other, other)))
        sentence = f"The {_SYSTEM_NAMES.get(first, first)} is better than {name} in "
        sentence += _count_verdicts(found)
        by_bleu = lookup(summary, "verdicts_bleu", other)
        if by_bleu:
            sentence += f" by chrF++; by BLEU it is better in {_count_verdicts(by_bleu)}"
        words.append(f"{sentence}.")
    return words


def _count_verdicts(found: Mapping[str, Sequence[str]]) -> str:
    counts = {kind: found.get(kind) or [] for kind in _VERDICT_MARKS}
    rest = []
    if counts["worse"]:
        rest.append(f"worse in {len(counts['worse'])}{_list_languages(counts['worse'])}")
    if counts["unclear"]:
        rest.append(f"level in {len(counts['unclear'])}")
    total = f"{len(counts['better'])} of {sum(map(len, counts.values()))} languages"
    return total + (f", {' and '.join(rest)}" if rest else "")


def format_signed(value: float) -> str:
    """``-2.84 -> '−2.8'``, with a real minus sign."""
    return f"{value:+.1f}".replace("-", "−")


def scores_section(inputs: ReportInputs) -> Html:
    """Return the section on scores, or a note on what is missing."""
    summary = inputs.summary
    languages = summary.get("languages") or {}
    if not languages:
        gap = inputs.gaps.get("summary.json", "summary.json has no languages.")
        return tag("p", f"{gap} Run moesaic eval on this run to score it.", class_="gap")
    systems = [str(name) for name in summary.get("systems") or ["model"]]
    order = sorted(
        languages, key=lambda key: -(lookup(languages[key], systems[0], "chrf", "score") or 0.0)
    )
    rows = [
        (
            _direction_title(key, languages[key]),
            [_score_dot(languages[key], system, "chrf") for system in systems],
        )
        for key in order
    ]
    shown = [_SYSTEM_NAMES.get(system, system) for system in systems]
    chart = dot_chart(rows, systems=shown, title="chrF++ on held-out text, by language")
    notes = tag(
        "ul", *(tag("li", str(note)) for note in summary.get("notes") or ()), class_="notes"
    )
    table, groups = _score_table(summary, order, systems), _group_table(summary, systems)
    return join_html([chart, table, notes, groups, _method_notes(summary)])


def samples_section(inputs: ReportInputs) -> Html:
    """Return sample translations, each with the experts of its tokens."""
    languages = inputs.summary.get("languages") or {}
    kept = {key: r["samples"] for key, r in languages.items() if r.get("samples")}
    if not kept:
        return tag("p", "No sample translations were kept.", class_="gap")
    systems = [str(name) for name in inputs.summary.get("systems") or ["model"]]
    traces_left = _MAX_TRACES
    blocks = []
    for number, (key, rows) in enumerate(kept.items()):
        result = languages[key]
        cards = []
        for row in rows:
            experts = row.get("experts") if traces_left > 0 else None
            traces = _expert_traces(experts or {}, opened=not blocks and not cards)
            traces_left -= bool(experts)
            cards.append(_sample_card(row, systems=systems, result=result, traces=traces))
        blocks.append(
            tag(
                "details",
                tag("summary", _direction_title(key, result), tag("span", key, class_="code")),
                *cards,
                open="" if number == 0 else None,
            )
        )
    lead = "Evenly spaced through the test set, not chosen by quality."
    return join_html([tag("p", lead, class_="soft"), *blocks])


def _score_table(summary: Mapping[str, Any], order: Sequence[str], systems: Sequence[str]) -> Html:
    first, *others = systems
    head = ["language", "sentences"]
    for metric in ("chrF++", "BLEU"):
        head += [f"{metric} {system}" for system in systems]
    head += [f"lead over {other}" for other in others] + ["placeholders kept", "off-target"]
    rows = []
    for key in order:
        result = summary["languages"][key]
        leads = [_difference_cell(result.get("differences"), other) for other in others]
        cells = [*_score_cells(result, systems), *leads, _off_target_cell(result.get(first))]
        cells.insert(-1, _kept_cell(lookup(result, first, "placeholders")))
        rows.append([_direction_title(key, result), str(result.get("count", "")), *cells])
    mean = summary.get("mean") or {}
    if mean:
        leads = [_difference_cell(summary.get("mean_differences"), other) for other in others]
        kept = _kept_cell(lookup(summary, "placeholders", first))
        rows.append(["mean of languages", "", *_score_cells(mean, systems), *leads, kept, ""])
    caption = "Scores with half the width of their 95 % interval; bold is the best of the row"
    return html_table(head, rows=rows, caption=caption)


def _score_cells(result: Mapping[str, Any], systems: Sequence[str]) -> list[HtmlChild]:
    cells: list[HtmlChild] = []
    for metric in ("chrf", "bleu"):
        dots = [_score_dot(result, system, metric) for system in systems]
        best = max((dot.value for dot in dots if dot), default=None)
        for dot in dots:
            if dot is None:
                cells.append("–")
                continue
            half = tag("small", f" ±{(dot.high - dot.low) / 2:.1f}")
            number = f"{dot.value:.1f}"
            cells.append(join_html([tag("b", number) if dot.value == best else number, half]))
    return cells


def _difference_cell(differences: Mapping[str, Any] | None, other: str) -> Html:
    found = lookup(differences, other)
    chrf = lookup(found, "chrf")
    if not chrf:
        return tag("span", "–")
    sign, words = _VERDICT_MARKS.get(found.get("verdict", ""), ("", ""))
    low, high = format_signed(chrf["low"]), format_signed(chrf["high"])
    interval = f"95 % interval {low} to {high}, p = {chrf['p']:.3f} (two-sided)"
    return tag(
        "span",
        tag("span", sign, class_=f"sign {found.get('verdict', '')}", aria_label=words),
        f" {format_signed(chrf['difference'])}",
        title=f"{words}; {interval}",
    )


def _kept_cell(rate: Mapping[str, Any] | None) -> HtmlChild:
    if not rate or not rate.get("of"):
        return "–"
    counted = f"{rate['kept']} of {rate['of']} strings with placeholders, tags or URLs keep all"
    return tag("span", f"{100 * rate['rate']:.0f} %", title=counted)


def _group_table(summary: Mapping[str, Any], systems: Sequence[str]) -> Html | None:
    """Return the scores of groups of rows apart from the others, or None if there is no group."""
    rows = [
        [_direction_title(key, result), *row]
        for key, result in summary["languages"].items()
        for name, group in (result.get("groups") or {}).items()
        for row in _group_rows(name, group, systems)
    ]
    if not rows:
        return None
    head = ["language", "rows", "number"]
    head += [f"{title} {system}" for title in METRIC_NAMES.values() for system in systems]
    table = html_table(head, rows=rows, caption="Scores of groups of rows, without intervals")
    return tag("details", tag("summary", "Groups of rows apart"), table, class_="quiet")


def _group_rows(
    name: str, group: Mapping[str, Any], systems: Sequence[str]
) -> Iterator[list[HtmlChild]]:
    titles = {"inside": _GROUP_NAMES.get(name, name), "outside": "the other rows"}
    for part, count in (("inside", group["count"]), ("outside", group["rest"])):
        if group[part]:
            scores = [float(group[part][s][m]) for m in METRIC_NAMES for s in systems]
            yield [titles[part], str(count), *(f"{score:.1f}" for score in scores)]


def _off_target_cell(result: Mapping[str, Any] | None) -> Html:
    for view, words in (("identified", "by language identification"), ("script", "by script")):
        rate = lookup(result, "off_target", view)
        if lookup(rate, "rate") is not None:
            counted = f"{rate['off']} of {rate['counted']} sentences, {words}"
            return tag("span", f"{100 * rate['rate']:.0f} %", title=counted)
    return tag("span", "–")


def _method_notes(summary: Mapping[str, Any]) -> Html:
    signatures = {
        f"{metric}: {signature}"
        for result in summary["languages"].values()
        for metric, signature in (result.get("signatures") or {}).items()
    }
    notes = sorted(signatures)
    words = (
        "Better and worse mean that the 95 % interval of the chrF++ difference excludes zero. "
        "chrF++ compares character sequences and word pairs with the reference; 100 is equal. "
        "Intervals and differences are from a paired bootstrap over the sentences."
    )
    return tag(
        "details",
        tag("summary", "How this was measured"),
        tag("p", words),
        tag("ul", *(tag("li", note) for note in notes)),
        class_="quiet",
    )


def _sample_card(
    row: Mapping[str, Any],
    *,
    systems: Sequence[str],
    result: Mapping[str, Any],
    traces: Html | None,
) -> Html:
    lines = [("source", row.get("source"), result.get("source"))]
    lines += [(s, row.get(s), result.get("target")) for s in systems if s != "copy" and s in row]
    lines.append(("reference", row.get("reference"), result.get("target")))
    shown = []
    for label, text, code in lines:
        shown.append(tag("dt", label))
        content = tag("span", "(nothing)", class_="soft") if not text else to_text(text)
        shown.append(tag("dd", content, dir="auto", lang=_bcp47_tag(code), class_=f"said {label}"))
    return tag("article", tag("dl", *shown), traces, class_="sample")


def _expert_traces(experts: Mapping[str, Any], *, opened: bool) -> Html | None:
    tables = [_expert_trace_table(experts, side=side) for side in ("source", "target")]
    if not any(tables):
        return None
    summary = tag("summary", "which experts")
    return tag("details", summary, *tables, class_="experts", open="" if opened else None)


def _expert_trace_table(experts: Mapping[str, Any], *, side: str) -> Html | None:
    """Return a table of layers by tokens; cells list the experts, in the color of the first one."""
    layers = lookup(experts, side, "layers")
    if not layers:
        return None
    head = ["layer", *(str(token) for token in lookup(experts, side, "tokens") or ())]
    rows = [[name, *(_expert_cell(edges) for edges in tokens)] for name, tokens in layers.items()]
    caption = "Tokens of the source" if side == "source" else "Tokens of the translation"
    return tag("div", html_table(head, rows=rows, caption=caption), class_="trace")


def _expert_cell(edges: Sequence[Sequence[float]]) -> Html:
    if not edges:
        return tag("span", "–", title="dropped")
    title = ", ".join(f"expert {int(e)} with weight {w:.2f}" for e, w in edges)
    names = "·".join(str(int(e)) for e, _ in edges)
    return tag("span", names, class_=f"chip tint{int(edges[0][0]) % 5}", title=title)


def _score_dot(result: Mapping[str, Any], system: str, metric: str) -> IntervalDot | None:
    score = lookup(result, system, metric)
    value = lookup(score, "score")
    if value is None:
        return None
    return IntervalDot(value, *(score.get(end, value) for end in ("low", "high")))


def _direction_title(key: str, result: Mapping[str, Any]) -> str:
    return str(result.get("name") or language_name(key))


def _bcp47_tag(code: object) -> str | None:
    parts = str(code or "").split("_")
    return "-".join(parts) if len(parts) > 1 else None


def _with_article(name: str) -> str:
    return name if name.startswith("copying") else f"the {name}"


def _list_languages(keys: Sequence[str]) -> str:
    return f" ({listed(map(language_name, keys), most=6)})" if keys else ""
