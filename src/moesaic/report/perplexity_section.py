"""Report section on quality: a language model's perplexity beside the scores of translations."""

from typing import Any

from moesaic.report.html import Html, html_table, join_html, tag
from moesaic.report.report_inputs import ReportInputs
from moesaic.report.score_sections import scores_section, verdict_sentences


def quality_section(inputs: ReportInputs) -> Html:
    """Return the perplexities of a language model, the scores of translations, or both."""
    groups = inputs.perplexity.get("groups") or []
    if not groups:
        return scores_section(inputs)
    table = _perplexity_table(inputs.perplexity, groups)
    return join_html([table, scores_section(inputs)]) if inputs.summary else table


def quality_sentences(inputs: ReportInputs) -> list[str]:
    """Return the result of an evaluation in sentences; none without one."""
    groups = inputs.perplexity.get("groups") or []
    words = verdict_sentences(inputs.summary)
    if groups:
        perplexity, bits = (_interval(groups[0][name], digits) for name, digits in _SCORES)
        words.insert(0, f"Perplexity {perplexity}, bits per byte {bits} on held-out texts.")
    return words


_SCORES = (("perplexity", 2), ("bits_per_byte", 3))


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
