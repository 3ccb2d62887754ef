"""Report section on quality: scores of translations, of texts by perplexity, or of another head."""

from collections.abc import Mapping
from typing import Any

from moesaic.report.html import Html, html_table, join_html, tag
from moesaic.report.report_inputs import ReportInputs, language_name
from moesaic.report.score_sections import scores_section, verdict_sentences


def quality_section(inputs: ReportInputs) -> Html:
    """Return the tables of what was scored: perplexities, scores of a head, translations."""
    found = []
    if groups := inputs.perplexity.get("groups") or []:
        found.append(_perplexity_table(inputs.perplexity, groups))
    if inputs.head_scores:
        found.append(_head_tables(inputs.head_scores))
    return join_html([*found, *([scores_section(inputs)] if inputs.summary or not found else [])])


def quality_sentences(inputs: ReportInputs) -> list[str]:
    """Return the result of an evaluation in sentences; none without one."""
    groups = inputs.perplexity.get("groups") or []
    words = verdict_sentences(inputs.summary)
    if groups:
        perplexity, bits = (_interval(groups[0][name], digits) for name, digits in _SCORES)
        words.insert(0, f"Perplexity {perplexity}, bits per byte {bits} on held-out texts.")
    if inputs.head_scores:
        values = _by_group(inputs.head_scores["scores"]).get("", {}).get("all", {})
        means = ", ".join(f"{name} {_interval(score, 4)}" for name, score in values.items())
        words.insert(0, f"On held-out rows: {means}.")
    return words


_SCORES = (("perplexity", 2), ("bits_per_byte", 3))


def _head_tables(found: dict[str, Any]) -> Html:
    """Return a table for each group of labels, with a row for each label."""
    names = list(found["scores"])
    tables = [
        html_table(
            (group or "rows", "rows", *names),
            rows=[_label_row(label, values, names) for label, values in by_label.items()],
            caption=f"Scores by {group}" if group else f"Scores of the {found['split']} split",
        )
        for group, by_label in _by_group(found["scores"]).items()
    ]
    words = "Means over predictions; intervals of 95 % by a bootstrap over rows."
    return join_html([*tables, tag("p", words, class_="soft")])


def _by_group(scores: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return scores by group, label and name; the group of all rows has no name."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, by_label in scores.items():
        for key, score in by_label.items():
            group, slash, label = key.partition("/")
            group, label = (group, label) if slash else ("", key)
            found.setdefault(group, {}).setdefault(label, {})[name] = score
    return found


def _label_row(label: str, values: Mapping[str, Any], names: list[str]) -> tuple[str, ...]:
    rows = max(score["rows"] for score in values.values())
    shown = (_interval(values[name], 4) if name in values else "" for name in names)
    return (language_name(label), f"{rows:,}", *shown)


def _perplexity_table(found: dict[str, Any], groups: list[dict[str, Any]]) -> Html:
    rows = [
        (
            str(group["name"]),
            f"{group['documents']:,}",
            f"{group['tokens']:,}",
            *(_interval(group[name], digits) for name, digits in _SCORES),
        )
        for group in groups
    ]
    words = (
        f"Texts: {found.get('texts')}. Windows of {found.get('window')} tokens that are "
        f"{found.get('stride')} apart; each token, and each document's end, is predicted once. "
        "Intervals of 95 % by a bootstrap over documents. Bits per byte of UTF-8 can be compared "
        "across tokenizers."
    )
    head = ("texts", "documents", "tokens", "perplexity", "bits per byte")
    caption = "Perplexity and bits per byte, by language and domain"
    return join_html([html_table(head, rows=rows, caption=caption), tag("p", words, class_="soft")])


def _interval(score: dict[str, Any], digits: int) -> str:
    low, high = (f"{score[end]:.{digits}f}" for end in ("low", "high"))
    return f"{score['score']:.{digits}f} ({low} to {high})"
