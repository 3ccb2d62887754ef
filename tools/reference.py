"""The reference: a page per package, written by `make reference` from signatures and docstrings."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "moesaic"
PAGES = ROOT / "docs" / "reference"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def page(package: Path) -> str:
    """Return the page of one package: its docstring, then every module's public names."""
    parts = [f"# moesaic.{package.name}", _doc(_parsed(package / "__init__.py"))]
    for path in sorted(package.rglob("*.py")):
        if path.name == "__init__.py":
            continue
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        tree = _parsed(path)
        parts += [f"## {module}", _doc(tree), *_entries(tree)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _entries(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"### {node.name}\n\n```python\n{_signature(node)}\n```"
            yield _doc(node)


def _signature(node: Definition) -> str:
    if not isinstance(node, ast.ClassDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){returns}"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
    methods = [
        _signature(n)
        for n in node.body
        if isinstance(n, ast.FunctionDef) and (n.name == "__call__" or n.name[0] != "_")
    ]
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    return "\n    ".join([head, *fields, *methods])


def _doc(node: ast.Module | Definition) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def main() -> None:
    """Write every page."""
    PAGES.mkdir(parents=True, exist_ok=True)
    packages = sorted(path.parent for path in SOURCE.glob("*/__init__.py"))
    for package in packages:
        (PAGES / f"{package.name}.md").write_text(page(package), encoding="utf-8")
    print(f"{len(packages)} pages in {PAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
