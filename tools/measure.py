"""What one Python file looks like from outside: sizes, names, imports, and what breaks a rule."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# what branches or repeats; `with` only opens and closes something (pylint counts the same ones)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.Match)
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
# an arXiv id is a year, a month and a number: 2101.03961
PAPER = re.compile(r"(?<![\d.])(?:0[7-9]|[12]\d)(?:0[1-9]|1[0-2])\.\d{4,5}(?![\d.]|\w)")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX)\b(?!\W*#\d+)")
DefNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Mark:
    """Something at a line."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Function:
    """One function or method. ``arguments`` counts the named ones, without ``self``.

    The verbs of the command line have options instead, which are not counted; nor are the
    pointers and sizes of a Triton kernel, which cannot be held together and have no Python type.
    """

    name: str
    line: int
    lines: int
    arguments: int
    flags: int
    nesting: int
    typed: bool


@dataclass(frozen=True, slots=True)
class File:
    """One parsed file. ``described`` tells of the module, its public classes and functions."""

    path: Path
    module: str
    lines: int
    code_lines: int
    functions: tuple[Function, ...]
    described: tuple[bool, ...]
    imports: tuple[Mark, ...]
    hidden_imports: tuple[Mark, ...]
    reflection: tuple[Mark, ...]
    distributed: tuple[Mark, ...]
    unfinished: tuple[Mark, ...]
    papers: tuple[Mark, ...]


def measure(path: Path, *, module: str) -> File:
    """Read and measure one file; ``module`` is its dotted name (of a package for __init__.py)."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    package = module.partition(".")[0]
    functions = tuple(_functions(tree, name=""))
    notes = [*_comments(tokens), *_docstrings(tree)]
    return File(
        path=path,
        module=module,
        lines=source.count("\n"),
        code_lines=_code_lines(tokens, tree),
        functions=functions,
        described=tuple(_described(tree)),
        imports=tuple(m for m in _imports(tree) if _within(m.text, package)),
        hidden_imports=tuple(
            m
            for node in ast.walk(tree)
            if isinstance(node, DefNode)
            for m in _imports(node)
            if _within(m.text, package)
        ),
        reflection=tuple(_reflection(tree)),
        distributed=tuple(_distributed(tree)),
        unfinished=tuple(m for m in notes if UNFINISHED.search(m.text)),
        papers=tuple(Mark(m.line, id_) for m in notes for id_ in PAPER.findall(m.text)),
    )


def nesting(node: ast.AST) -> int:
    """Return how many blocks stand inside each other at the deepest; ``elif`` is not deeper."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS):
            continue
        otherwise = isinstance(node, ast.If) and node.orelse == [child]
        own = isinstance(child, BLOCKS) and not (otherwise and isinstance(child, ast.If))
        deepest = max(deepest, int(own) + nesting(child))
    return deepest


def _functions(node: ast.AST, *, name: str) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        full = name
        if isinstance(child, DEFINITIONS):
            full = f"{name}.{child.name}".strip(".")
        if isinstance(child, DefNode):
            yield _function(child, name=full, method=isinstance(node, ast.ClassDef))
        yield from _functions(child, name=full)


def _function(node: DefNode, *, name: str, method: bool) -> Function:
    spec = node.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if method and not static and named:
        named = named[1:]
    starred = [arg for arg in (spec.vararg, spec.kwarg) if arg]
    defaults = [*spec.defaults, *spec.kw_defaults]
    flags = {
        a.arg for a in named if isinstance(a.annotation, ast.Name) and a.annotation.id == "bool"
    }
    unmarked = sum(
        isinstance(d, ast.Constant) and isinstance(d.value, bool) for d in defaults if d is not None
    )
    return Function(
        name=name,
        line=node.lineno,
        lines=(node.end_lineno or node.lineno) - node.lineno + 1,
        arguments=0 if _is_verb(node) or _is_kernel(node) else len(named),
        flags=max(len(flags), unmarked),
        nesting=nesting(node),
        typed=_is_kernel(node)
        or (node.returns is not None and all(a.annotation for a in named + starred)),
    )


def _is_verb(node: DefNode) -> bool:
    """Tell whether typer's ``@app.command()`` stands above it."""
    calls = (d.func for d in node.decorator_list if isinstance(d, ast.Call))
    return any(isinstance(func, ast.Attribute) and func.attr == "command" for func in calls)


def _is_kernel(node: DefNode) -> bool:
    """Tell whether ``@triton.jit`` stands above it."""
    plain = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return any(
        isinstance(d, ast.Attribute)
        and d.attr == "jit"
        and isinstance(d.value, ast.Name)
        and d.value.id == "triton"
        for d in plain
    )


def _described(tree: ast.Module) -> Iterator[bool]:
    yield ast.get_docstring(tree) is not None
    for node in tree.body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
            yield ast.get_docstring(node) is not None


def _imports(tree: ast.AST) -> Iterator[Mark]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Mark(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (Mark(node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _within(name: str, package: str) -> bool:
    return name.partition(".")[0] == package


def _reflection(tree: ast.Module) -> Iterator[Mark]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="hasattr")):
                yield Mark(node.lineno, "hasattr")
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(), *_]):
                yield Mark(node.lineno, "getattr with a literal")


def _distributed(tree: ast.Module) -> Iterator[Mark]:
    yield from (m for m in _imports(tree) if f"{m.text}.".startswith("torch.distributed."))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield Mark(node.lineno, "torch.distributed")


def _comments(tokens: list[tokenize.TokenInfo]) -> Iterator[Mark]:
    for token in tokens:
        if token.type == tokenize.COMMENT:
            yield Mark(token.start[0], token.string)


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Expr]:
    """Yield every string that stands alone: docstrings, and those below a field."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                yield node


def _docstrings(tree: ast.Module) -> Iterator[Mark]:
    for node in _docstring_nodes(tree):
        assert isinstance(node.value, ast.Constant)
        for offset, line in enumerate(str(node.value.value).splitlines()):
            yield Mark(node.lineno + offset, line)


def _code_lines(tokens: list[tokenize.TokenInfo], tree: ast.Module) -> int:
    spoken: set[int] = set()
    for token in tokens:
        if token.type not in SILENT:
            spoken.update(range(token.start[0], token.end[0] + 1))
    for node in _docstring_nodes(tree):
        spoken.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(spoken)
