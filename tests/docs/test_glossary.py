"""Each of our names in the glossary is an identifier of the package."""

import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [
    line.strip("| \n").split(" | ")
    for line in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| term")
]


def identifiers():
    for path in (ROOT / "src").rglob("*.py"):
        for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
            if token.type == tokenize.NAME:
                yield token.string


def test_every_term_has_a_sentence_and_a_name_elsewhere_or_none():
    assert len(ROWS) > 150
    assert [row for row in ROWS if len(row) != 6 or not all(cell.strip() for cell in row)] == []


def test_terms_are_sorted_and_none_stands_twice():
    terms = [re.sub(r"[`\W]", "", row[0]).lower() for row in ROWS]
    assert terms == sorted(set(terms))


def test_our_names_exist():
    known = set(identifiers())
    names = [
        name
        for term, *_ in ROWS
        for code in re.findall(r"`([^`]+)`", term)
        for name in re.findall(r"[A-Za-z_]\w*", code)
        if not code.startswith(("moesaic ", "--"))
    ]
    assert sorted({name for name in names if name not in known}) == []
