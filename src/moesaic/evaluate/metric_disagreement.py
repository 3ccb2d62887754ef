"""Where chrF++ and BLEU disagree about two systems, and which rows make the difference.

BLEU multiplies the precisions of one to four whole words, so rows that another system gets exactly
right weigh more than by chrF++, which counts parts of words. The reason given is computed: the
group of rows without which the mean BLEU lead has the sign of the chrF++ lead.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from moesaic.evaluate.test_set_result import TestSetResult

_GROUPS = {
    "copied": "rows whose reference equals the source",
    "marked": "rows with placeholders, tags or URLs",
    "seen": "rows that were trained on",
}
_NAMES = {"copy": "copying the source", "memory": "the translation memory"}


def metric_disagreements(
    systems: Sequence[str], languages: Mapping[str, TestSetResult]
) -> Iterator[str]:
    """Yield a sentence per other system that the first one leads by one metric and not by BLEU."""
    first, *others = systems
    for other in others:
        leads = {key: result.differences[other] for key, result in languages.items()}
        split = [k for k, d in leads.items() if d["chrf"].difference * d["bleu"].difference < 0]
        mean = {
            m: float(np.mean([d[m].difference for d in leads.values()])) for m in ("chrf", "bleu")
        }
        if not split and mean["chrf"] * mean["bleu"] >= 0:
            continue
        name, chosen = _NAMES.get(other, other), {k: languages[k] for k in split or languages}
        yield (
            f"Against {name}, the {first} is {_lead(mean['chrf'])} by chrF++ and "
            f"{_lead(mean['bleu'])} by BLEU on average; the two metrics disagree in {len(split)} "
            f"of {len(leads)}. {_reason(first, other, chosen)}"
        )


def _reason(first: str, other: str, languages: Mapping[str, TestSetResult]) -> str:
    """Return which rows the disagreement comes from, by scoring without each group."""
    sign = np.sign(sum(r.differences[other]["chrf"].difference for r in languages.values()))
    shares = []
    for group, words in _GROUPS.items():
        found = [r.groups[group] for r in languages.values() if group in r.groups]
        if not found:
            continue
        count, total = sum(g.count for g in found), sum(len(r.test) for r in languages.values())
        without = [_bleu_lead(result, group, first, other) for result in languages.values()]
        share = f"{words} are {count / total:.0%}"
        if without and np.mean(without) * sign > 0:
            inside = [
                float(np.mean([g.inside[system]["bleu"] for g in found]))
                for system in (first, other)
            ]
            return (
                f"The reason: {share} of the rows; in them BLEU is {inside[0]:.1f} against "
                f"{inside[1]:.1f}, and without them it is {_lead(float(np.mean(without)))} there."
            )
        shares.append(f"{share} (without them BLEU is {_lead(float(np.mean(without)))})")
    copied = _copied_words(languages)
    known = f"; {', '.join(shares)}" if shares else ""
    return (
        "No one group of rows is the reason: BLEU counts whole words and sequences of them, chrF++ "
        f"parts of words; {copied:.0%} of the words of the references stand in the source{known}."
    )


def _bleu_lead(result: TestSetResult, group: str, first: str, other: str) -> float:
    """Return the BLEU lead on the rows outside of a group: all rows if it has none."""
    found = result.groups.get(group)
    if found is None:
        return result.differences[other]["bleu"].difference
    if not found.outside:
        return 0.0
    return found.outside[first]["bleu"] - found.outside[other]["bleu"]


def _copied_words(languages: Mapping[str, TestSetResult]) -> float:
    copied = total = 0
    for result in languages.values():
        for source, reference in zip(result.test.sources, result.test.references, strict=True):
            words, of_source = reference.split(), set(source.split())
            copied += sum(word in of_source for word in words)
            total += len(words)
    return copied / total if total else 0.0


def _lead(value: float) -> str:
    return f"{abs(value):.1f} {'above' if value >= 0 else 'below'}"
