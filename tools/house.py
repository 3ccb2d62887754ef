"""Measure the repository: size and style beside other code bases, and the limits that CI holds.

python tools/house.py                        print both tables; exit 1 beyond a limit
python tools/house.py --quiet                print only what is beyond a limit
python tools/house.py --write-contributing   refresh the tables in CONTRIBUTING.md

Two limits are zero: public names that are defined twice, and definitions that nothing refers to.
"""

import ast
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import File, Function, Mark, measure
from unused import Definition, defined_twice, unused_definitions

ROOT = Path(__file__).resolve().parents[1]
ANCHORS = Path(__file__).with_name("anchors.tsv")
MARKERS = ("<!-- house: begin -->", "<!-- house: end -->")
FILE_LIMIT = 400
SMALL_FILE = 30
# plain definitions that tests compare a fast path with, and the package for tests of users
TWIN_PREFIX = "reference_"
PUBLIC_PACKAGES = ("testing",)
# per function: what is measured, how, and the most that is allowed
MEASURES: tuple[tuple[str, Callable[[Function], int], int], ...] = (
    ("lines of a function", lambda f: f.lines, 60),
    ("arguments", lambda f: f.arguments, 6),
    ("nesting", lambda f: f.nesting, 3),
)
NO_DISTRIBUTED = ("moesaic.core", "moesaic.distributed.parallel_plan")
TEXT = (".py", ".md", ".toml", ".yaml", ".yml", ".cff", ".sh", ".txt", ".json", ".tsv", ".html")
# a home or a workplace of one machine has no place in a file that others read
MACHINE_PATH = re.compile(r"(?<![\w.$}>])/(?:home|Users|root|work|farm)/\w")


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A broken rule: where, what was found, what the limit is."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Repository:
    """The measured files of the package, the lines of its tests, and what its names show."""

    root: Path
    files: tuple[File, ...]
    test_lines: int
    twice: dict[str, list[Path]]
    unused: list[Definition]

    def functions(self) -> Iterator[tuple[File, Function]]:
        return ((file, function) for file in self.files for function in file.functions)


def measure_repository(root: Path) -> Repository:
    """Measure ``src/`` under ``root``. Raises SyntaxError for a file that is not Python."""
    source = root / "src"
    files = []
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        files.append(measure(path, module=module))
    tests = (root / "tests").rglob("*.py")
    sources = {file.path: ast.parse(file.path.read_text(encoding="utf-8")) for file in files}
    unused = unused_definitions(sources, references=[*sources, *_references(root)])
    return Repository(
        root,
        tuple(files),
        sum(_line_count(path) for path in tests),
        defined_twice(sources),
        [definition for definition in unused if not _is_for_tests(definition, source=source)],
    )


def cycles(files: Iterable[File]) -> list[list[str]]:
    """Return the groups of modules that import each other, also through others."""
    modules = {file.module: file for file in files}
    graph = {
        name: {_target(mark.text, modules) for mark in file.imports} & modules.keys() - {name}
        for name, file in modules.items()
    }
    reach = {name: _reach(name, graph) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def findings(repository: Repository) -> list[Finding]:
    """Return everything beyond the limits, in the order of the files."""
    found = [
        *_too_big(repository),
        *_forbidden(repository),
        *(
            _at(repository, file, line=mark.line, text=text)
            for file, mark, text in _cyclic(repository)
        ),
        *_unlisted_papers(repository),
        *_names(repository),
        *_machine_paths(repository.root),
    ]
    return sorted(found)


def comparison(repository: Repository) -> list[dict[str, str]]:
    """Return one row per anchor, in the columns of ``anchors.tsv``, and ours first."""
    lines = ANCHORS.read_text(encoding="utf-8").splitlines()
    names = lines[0].split("\t")
    anchors = [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]
    return [dict(zip(names, _our_row(repository), strict=True)), *anchors]


def limits(repository: Repository) -> list[dict[str, str]]:
    """Return one row per measure that has a limit: what we have, the limit, and where."""
    files, functions = repository.files, list(repository.functions())
    described = [d for file in files for d in file.described]
    big = max(files, key=lambda f: f.lines)
    rows = [("lines of a file", big.lines, FILE_LIMIT, big.module)]
    for name, measured, limit in MEASURES:
        file, worst = max(functions, key=lambda pair, measured=measured: measured(pair[1]))
        rows.append((name, measured(worst), limit, f"{file.module}.{worst.name}"))
    table = [
        {"measure": name, "most": str(most), "limit": str(limit), "where": where}
        for name, most, limit, where in rows
    ]
    for name, share in (
        ("public names described", _percent(described)),
        ("functions fully typed", _percent(f.typed for _, f in functions)),
    ):
        table.append({"measure": name, "most": share, "limit": "", "where": ""})
    code = sum(f.code_lines for f in files)
    small = sum(f.lines < SMALL_FILE for f in files)
    for name, found, limit in (
        ("lines of code proper", f"{code:,}", ""),
        ("files", str(len(files)), ""),
        (f"files under {SMALL_FILE} lines", str(small), ""),
        ("public classes and modules defined twice", str(len(repository.twice)), "0"),
        ("unused definitions", str(len(repository.unused)), "0"),
    ):
        table.append({"measure": name, "most": found, "limit": limit, "where": ""})
    return table


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return an aligned Markdown table; every column but the first and ``where`` goes right."""
    names = list(rows[0])
    left = {names[0], "where"}
    widths = {n: max(len(n), *(len(row[n]) for row in rows)) for n in names}
    rule = {n: "-" * widths[n] if n in left else "-" * (widths[n] - 1) + ":" for n in names}
    text = []
    for row in ({n: n for n in names}, rule, *rows):
        cells = [row[n].ljust(widths[n]) if n in left else row[n].rjust(widths[n]) for n in names]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def tables(repository: Repository) -> str:
    """Return both tables as Markdown."""
    return f"{markdown(comparison(repository))}\n\n{markdown(limits(repository))}"


def write_between(path: Path, text: str) -> None:
    """Put ``text`` between the two markers of a file. Raises ValueError where they are missing."""
    begin, end = MARKERS
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} needs the markers {begin} and {end}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Print what is asked for and return the exit code."""
    repository = measure_repository(ROOT)
    if "--write-contributing" in arguments:
        write_between(ROOT / "CONTRIBUTING.md", tables(repository))
    elif "--quiet" not in arguments:
        print(tables(repository))
    found = findings(repository)
    for finding in found:
        print(finding, file=sys.stderr)
    if found:
        print(f"tools/house.py: {len(found)} beyond the limits", file=sys.stderr)
    return 1 if found else 0


def _too_big(repository: Repository) -> Iterator[Finding]:
    for file in repository.files:
        if file.lines > FILE_LIMIT:
            text = f"{file.lines} lines of a file, limit {FILE_LIMIT}"
            yield _at(repository, file, line=FILE_LIMIT, text=text)
    for file, function in repository.functions():
        for name, measured, limit in MEASURES:
            if (found := measured(function)) > limit:
                text = f"{function.name}: {found} {name}, limit {limit}"
                yield _at(repository, file, line=function.line, text=text)


def _forbidden(repository: Repository) -> Iterator[Finding]:
    for file in repository.files:
        rules = {
            "import of our own inside a function": file.hidden_imports,
            "use a type instead": file.reflection,
            "unfinished, and no issue number": file.unfinished,
        }
        if file.module.startswith(NO_DISTRIBUTED):
            rules["must not import torch.distributed"] = file.distributed
        for why, marks in rules.items():
            for mark in marks:
                yield _at(
                    repository, file, line=mark.line, text=f"{mark.text.strip()}: {why}; limit 0"
                )


def _cyclic(repository: Repository) -> Iterator[tuple[File, Mark, str]]:
    modules = {file.module: file for file in repository.files}
    for group in cycles(repository.files):
        file = modules[group[0]]
        inside = [m for m in file.imports if _target(m.text, modules) in group]
        text = f"import cycle of {', '.join(group)}; limit 0"
        yield file, inside[0], text


def _unlisted_papers(repository: Repository) -> Iterator[Finding]:
    listing = repository.root / "docs" / "papers.md"
    if not listing.exists():
        return
    listed = listing.read_text(encoding="utf-8")
    for file in repository.files:
        for mark in file.papers:
            if mark.text not in listed:
                text = f"arXiv:{mark.text} is not in docs/papers.md"
                yield _at(repository, file, line=mark.line, text=text)


def _names(repository: Repository) -> Iterator[Finding]:
    for name, paths in repository.twice.items():
        others = ", ".join(_relative(path, repository.root) for path in paths[1:])
        where = _relative(paths[0], repository.root)
        yield Finding(where, 1, f"{name} is defined in {others} too: one name, one meaning")
    for definition in repository.unused:
        where = _relative(definition.path, repository.root)
        yield Finding(where, definition.line, f"{definition.name}: nothing refers to it; limit 0")


def _references(root: Path) -> list[Path]:
    """Return the files, besides the package, that may use a definition: all but tests."""
    code = [p for name in ("benchmarks", "tools", "examples") for p in (root / name).rglob("*.py")]
    return [*code, *root.glob("*.md"), *(root / "docs").rglob("*.md")]


def _is_for_tests(definition: Definition, *, source: Path) -> bool:
    package = definition.path.relative_to(source).parts[1]
    return definition.name.startswith(TWIN_PREFIX) or package in PUBLIC_PACKAGES


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _machine_paths(root: Path) -> Iterator[Finding]:
    folders = ("src", "tests", "tools", "docs", "examples", "benchmarks", ".ci")
    inside = (path for folder in folders for path in (root / folder).rglob("*"))
    for path in (*root.glob("*"), *inside):
        if not path.is_file() or (path.suffix not in TEXT and path.parent.name != ".ci"):
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if MACHINE_PATH.search(line):
                where = str(path.relative_to(root))
                yield Finding(where, number, "a path of one machine; limit 0")


def _our_row(repository: Repository) -> list[str]:
    files, functions = repository.files, [f for _, f in repository.functions()]
    lines = sum(f.lines for f in files)
    longest = max(functions, key=lambda f: f.lines)
    rings = cycles(files)
    return [
        "**moesaic**",
        str(len(files)),
        f"{lines / 1000:.1f}k",
        str(round(statistics.median(f.lines for f in files if f.lines))),
        _percent(f.lines > 400 for f in files),
        str(sum(f.lines > 1000 for f in files)),
        str(longest.lines),
        _percent(f.lines > 60 for f in functions),
        _percent(f.typed for f in functions),
        str(round(100 * sum(f.flags for f in functions) / len(functions))),
        f"{len(rings)} ({max(map(len, rings))})" if rings else "0",
        str(sum(len(f.hidden_imports) for f in files)),
        str(sum(m.text == "hasattr" for f in files for m in f.reflection)),
        str(sum(len(f.unfinished) for f in files)),
        f"{repository.test_lines / lines:.2f}",
    ]


def _percent(values: Iterable[bool]) -> str:
    values = list(values)
    return f"{100 * sum(values) / max(1, len(values)):.0f}%"


def _target(name: str, modules: Mapping[str, object]) -> str:
    """Return the module that ``from a.b import c`` needs: ``a.b.c`` if it is one, or ``a.b``."""
    return name if name in modules else name.rpartition(".")[0]


def _reach(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), set()) - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def _line_count(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def _at(repository: Repository, file: File, *, line: int, text: str) -> Finding:
    return Finding(str(file.path.relative_to(repository.root)), line, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
