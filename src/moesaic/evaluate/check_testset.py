"""Test sets of files: normalised as training text is, and what is odd about them is said.

Scores are of the normalised references: a model is trained on such text and gives such text. Where
that changed a reference, the score against the references as they are in the file, which is what
sacreBLEU computes on that file, stands in a note of the summary.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from moesaic.core.errors import UserError, listed
from moesaic.corpus.languages import resolve_language
from moesaic.corpus.text_rules import GeneralText, TextRules
from moesaic.evaluate.testset import TestSet

_HEADER_WORDS = frozenset(
    (
        *("source", "src", "sentence", "text", "input", "english", "original", "question"),
        *("target", "tgt", "trg", "reference", "ref", "translation", "hypothesis", "output"),
    )
)
_HEADER_ENDS = frozenset(
    ("text", "sentence", "segment", "string", "language", "lang", "en", "de", "fr", "es", "1", "2")
)
_SHOWN_ROWS = 5


def normalise_testset(test: TestSet, rules: TextRules) -> TestSet:
    """Return the test set with both sides as training text; ``raw_references`` keeps the file's."""
    sources = tuple(map(rules.normalise, test.sources))
    references = tuple(map(rules.normalise, test.references))
    raw = test.references if references != test.references else ()
    changed = sum(a != b for a, b in zip(sources, test.sources, strict=True))
    changed_references = sum(a != b for a, b in zip(references, test.references, strict=True))
    notes = list(test.notes)
    if changed or changed_references:
        notes.append(
            f"{test.name}: {changed} of {len(test)} sources and {changed_references} references "
            "were normalised as training text is (NFC, white space, characters that are not "
            "visible"
            + (")" if isinstance(rules, GeneralText) else ", and more: the rules of its corpus)")
        )
    return replace(
        test, sources=sources, references=references, raw_references=raw, notes=tuple(notes)
    )


def notes_on_testset(test: TestSet) -> Iterator[str]:
    """Yield the test set's own notes, and one on each kind of odd row."""
    yield from test.notes
    for side, texts in (("sources", test.sources), ("references", test.references)):
        empty = [i + 1 for i, text in enumerate(texts) if not text.strip()]
        if empty:
            yield (
                f"{test.name}: {len(empty)} of {len(test)} {side} are empty ({_row_list(empty)}); "
                "they are scored as sacreBLEU scores them"
            )
    first = test.sources[0], test.references[0]
    if all(_is_heading(text, code) for text, code in zip(first, test.direction, strict=True)):
        yield (
            f'{test.name}: its first row, "{first[0]}" and "{first[1]}", looks like a header and '
            "was scored as a sentence; delete it from the file"
        )


def _is_heading(text: str, code: str) -> bool:
    """Whether a text is a word of a header, or the name of the column's language."""
    first, *rest = re.split(r"[\s_.-]+", text.strip().casefold())
    if first in _HEADER_WORDS and (not rest or (len(rest) == 1 and rest[0] in _HEADER_ENDS)):
        return True
    try:
        return len(text) < 30 and resolve_language(text.strip()).code == code
    except UserError:
        return False


def _row_list(rows: Sequence[int]) -> str:
    return f"row{'s' * (len(rows) > 1)} {listed(map(str, rows), most=_SHOWN_ROWS)}"
