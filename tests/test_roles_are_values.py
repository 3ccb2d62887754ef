"""No module of the package has the number of an id in it: roles are values of a vocabulary."""

import ast
from collections.abc import Iterator
from pathlib import Path

import moesaic

ROLE_NAMES = {"PAD", "BOS", "EOS", "UNK", "MASK"}
# what holds ids in this package; none of it may be compared with a number
ID_NAMES = {"ids", "token", "tokens", "label", "labels", "target_in", "target_out"}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(Path(moesaic.__file__).parent.rglob("*.py")):
        yield str(path), ast.parse(path.read_text(encoding="utf-8"))


def test_no_module_has_a_constant_for_the_id_of_a_role() -> None:
    found = [
        (path, node.id)
        for path, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in ROLE_NAMES
    ]
    assert found == []


def test_no_id_is_compared_with_a_number() -> None:
    found = [
        (path, ast.unparse(node))
        for path, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and all(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
        and _name(node.left) in ID_NAMES
        and any(
            isinstance(other, ast.Constant) and isinstance(other.value, int)
            for other in node.comparators
        )
    ]
    assert found == []


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
