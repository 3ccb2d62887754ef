"""Unused definitions and names defined twice, found in the syntax trees of a package.

A definition (function, method, class, constant) counts as used when its name occurs anywhere else
in the files that are given: as an identifier, as a word of a string, or in a Python block of a
Markdown page. What only unused code refers to is not found.
"""

import ast
import io
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
WORD = re.compile(r"[A-Za-z_]\w*")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# decorators that leave the callers unchanged; any other one may register the definition somewhere
PLAIN_DECORATORS = {
    *("property", "cached_property", "staticmethod", "classmethod", "dataclass", "total_ordering"),
    *("no_grad", "inference_mode", "contextmanager", "cache", "lru_cache", "abstractmethod"),
    *("runtime_checkable", "once_differentiable", "final", "wraps", "override"),
}
# bases that call no method of a subclass; any other foreign base may be called by its library
INERT_BASES = {
    *("ABC", "Protocol", "Generic", "NamedTuple", "TypedDict", "Enum", "StrEnum", "IntEnum"),
    *("object", "str", "int", "float", "tuple", "dict", "list", "Exception", "RuntimeError"),
    *("ValueError", "TypeError"),
}


@dataclass(frozen=True, slots=True, order=True)
class Definition:
    """A named definition: ``name`` is dotted inside classes, ``path`` and ``line`` say where."""

    path: Path
    line: int
    name: str


def unused_definitions(
    sources: Mapping[Path, ast.Module], *, references: Iterable[Path], exempt: Iterable[str] = ()
) -> list[Definition]:
    """Return the definitions in ``sources`` whose name occurs in no reference but themselves.

    ``references`` are Python and Markdown files, the sources among them; ``exempt`` names are used
    from outside (a public interface).
    """
    seen = Counter(word for path in references for word in _words(path))
    classes = {
        n.name: n
        for tree in sources.values()
        for n in ast.walk(tree)
        if isinstance(n, ast.ClassDef)
    }
    found = [
        d for path, tree in sources.items() for d in _definitions(tree, path=path, classes=classes)
    ]
    defined = Counter(d.name.rpartition(".")[2] for d in found)
    allowed = set(exempt)
    return sorted(
        d
        for d in found
        if (last := d.name.rpartition(".")[2]) not in allowed and seen[last] <= defined[last]
    )


def defined_twice(sources: Mapping[Path, ast.Module]) -> dict[str, list[Path]]:
    """Return each public class name and module basename that more than one file defines."""
    places: defaultdict[str, list[Path]] = defaultdict(list)
    for path, tree in sources.items():
        if path.stem not in ("__init__", "__main__", "config"):
            places[f"{path.stem}.py"].append(path)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return {name: paths for name, paths in sorted(places.items()) if len(paths) > 1}


def _definitions(
    tree: ast.Module, *, path: Path, classes: Mapping[str, ast.ClassDef]
) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            if _is_plain(node) and not _is_special(node.name):
                yield Definition(path, node.lineno, node.name)
        elif isinstance(node, ast.ClassDef):
            if _is_plain(node) and not _derives_from(node, {"Config", "Choice"}, classes):
                yield Definition(path, node.lineno, node.name)
            yield from _methods(node, path=path, classes=classes)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (t.id for t in targets if isinstance(t, ast.Name))
            yield from (Definition(path, node.lineno, n) for n in names if not _is_special(n))


def _methods(
    node: ast.ClassDef, *, path: Path, classes: Mapping[str, ast.ClassDef]
) -> Iterator[Definition]:
    if not set(_foreign_bases(node, classes)) <= INERT_BASES:
        return
    for child in node.body:
        if isinstance(child, FUNCTIONS) and not _is_special(child.name) and _is_plain(child):
            yield Definition(path, child.lineno, f"{node.name}.{child.name}")


def _is_plain(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return all(_last_name(decorator) in PLAIN_DECORATORS for decorator in node.decorator_list)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _foreign_bases(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Iterator[str]:
    for base in map(_last_name, node.bases):
        if base in ("Config", "Choice"):
            continue
        if base in classes and classes[base] is not node:
            yield from _foreign_bases(classes[base], classes)
        else:
            yield base


def _derives_from(
    node: ast.ClassDef, wanted: set[str], classes: Mapping[str, ast.ClassDef]
) -> bool:
    return any(
        base in wanted
        or (
            base in classes
            and classes[base] is not node
            and _derives_from(classes[base], wanted, classes)
        )
        for base in map(_last_name, node.bases)
    )


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return _last_name(inner)
    return ""


def _words(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from (w for block in PYTHON_BLOCK.findall(text) for w in WORD.findall(block))
        return
    docstrings = set(_docstring_lines(ast.parse(text)))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            yield token.string
        elif token.type == tokenize.STRING and token.start[0] not in docstrings:
            yield from WORD.findall(token.string)


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                yield node.lineno
