"""The page of faults names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/faults.md").read_text("utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", PAGE)))


def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists():
    missing = [
        f"{file}::{name}"
        for file, name in NAMED
        if not (ROOT / file).is_file() or (name and name not in functions_of(file))
    ]
    assert missing == []


def test_every_kind_names_a_test():
    kinds = PAGE.partition("## Kinds")[2]
    rows = [line for line in kinds.splitlines() if line.startswith("| ")]
    bodies = [row for row in rows if not row.startswith(("| kind |", "| ---"))]
    assert len(bodies) > 40
    assert [row[:80] for row in bodies if "`tests/" not in row] == []
