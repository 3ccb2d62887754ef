"""No module of the package has the number of an id in it: roles are values of a vocabulary."""

import ast
from collections.abc import Iterator
from pathlib import Path

import moesaic

ROLE_NAMES = {"PAD", "BOS", "EOS", "UNK", "MASK"}
# what holds ids in this package; none of it may be compared with a number
ID_NAMES = {"ids", "token", "tokens", "label", "labels", "target_in", "target_out"}


def _nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(Path(moesaic.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield str(path), node


def _compares_an_id(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Compare)
        and all(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
        and _name(node.left) in ID_NAMES
        and any(
            isinstance(other, ast.Constant) and isinstance(other.value, int)
            for other in node.comparators
        )
    )


def test_no_module_has_a_constant_for_the_id_of_a_role_or_compares_an_id_with_a_number() -> None:
    constants, comparisons = [], []
    for path, node in _nodes():
        if isinstance(node, ast.Name) and node.id in ROLE_NAMES:
            constants.append((path, node.id))
        elif _compares_an_id(node):
            comparisons.append((path, ast.unparse(node)))
    assert constants == []
    assert comparisons == []


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
