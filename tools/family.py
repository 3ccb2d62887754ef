"""The table of routing rules and parts of a model, generated from the classes themselves.

python tools/family.py           write docs/family.md
python tools/family.py --check   exit 1 if it is out of date
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import moesaic.model
import moesaic.moe
import moesaic.nn
from moesaic.core.config import Choice
from moesaic.data.language_tag import LanguageTag
from moesaic.moe.auxiliary_losses import Balance
from moesaic.moe.config import SparseLayer
from moesaic.moe.dispatch_projection import DispatchProjection
from moesaic.moe.expert_capacity import Limit, Priority
from moesaic.moe.expert_selection import Select
from moesaic.moe.experts import Expert
from moesaic.moe.null_experts import NullExperts
from moesaic.moe.router_gate import CrossLayerRouting, RouterInput
from moesaic.moe.router_noise import RouterNoise
from moesaic.moe.shared_experts import SharedExpertBranch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "family.md"
OF_A_LAYER: tuple[type[Choice], ...] = (
    Select,
    Limit,
    Priority,
    Balance,
    RouterNoise,
    RouterInput,
    CrossLayerRouting,
    Expert,
    SharedExpertBranch,
    DispatchProjection,
    NullExperts,
    SparseLayer,
)
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
ARXIV_IN_BRACKETS = re.compile(r" \((?:arXiv:)?\d{4}\.\d{5}\)")
SENTENCE = re.compile(r".+?[.](?=\s+[A-Z`]|\s*$)", re.S)
# tables that parametrise laws, and the module by which a law imports each
TABLES = {"tests/moe/variants.py": r"variants", "tests/mixer_cases.py": r"mixer_cases|samples"}
RULES = "tests/moe/variants.py"

INTRO = """\
# Routing rules, parts of an MoE layer, and parts of a model

All values of each config field of an MoE layer, then those of the other parts of a model (sequence
mixers and what belongs to attention, positions, norms, inputs, heads, ...), family by family.
`make reference` generates this page from the classes; a test fails if it is out of date. Lines
count code only, without docstrings, comments and blank lines. Each rule in `tests/moe/variants.py`
is checked by the law tests that use this table: {laws} of {all}.
"""


@dataclass(frozen=True, slots=True)
class Tests:
    """The text of each test file by its path, and which laws use the table of rules."""

    texts: dict[str, str]

    @staticmethod
    def read(root: Path) -> "Tests":
        """Read every Python file under ``tests``."""
        found = sorted((root / "tests").rglob("*.py"))
        return Tests({p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in found})

    def naming(self, word: str) -> list[str]:
        """Return the files that contain the word."""
        whole = re.compile(rf"\b{re.escape(word)}\b")
        return [path for path, text in self.texts.items() if whole.search(text)]

    @property
    def laws(self) -> list[str]:
        """Files that hold a law."""
        return [path for path in self.texts if path.startswith("tests/laws/test_")]

    def laws_over(self, table: str) -> list[str]:
        """Laws that use a table of rules or of mixers."""
        through = re.compile(rf"^\s*(?:from|import) [\w.]*\b(?:{TABLES[table]})\b", re.M)
        return [path for path in self.laws if through.search(self.texts[path])]


def members(family: type[Choice]) -> list[type[Choice]]:
    """Return the built-in members of a family, by module and line."""
    # not those that other packages define for themselves (an even load for dry runs)
    packages = ("moesaic.moe.", "moesaic.model.", "moesaic.nn.", "moesaic.data.")
    own = [c for c in family.members.values() if c.__module__.startswith(packages)]
    return sorted(own, key=lambda c: (c.__module__, inspect.getsourcelines(c)[1]))


def lines_of_code(cls: type) -> int:
    """Return the lines of a class that are neither blank nor comment nor docstring."""
    source = textwrap.dedent(inspect.getsource(cls))
    described = set[int]()
    for node in ast.walk(ast.parse(source)):
        text = node.value if isinstance(node, ast.Expr) else None
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            described |= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(
        bool(text.strip()) and not text.strip().startswith("#") and number not in described
        for number, text in lines
    )


def page(root: Path = ROOT) -> str:
    """Return the whole page."""
    tests = Tests.read(root)
    parts = [INTRO.format(laws=len(tests.laws_over(RULES)), all=len(tests.laws))]
    for family in families():
        parts += [f"\n## {family.__name__}\n", f"{_first_sentence(family)}\n"]
        parts.append("| member | paper | what it is | in | lines | checked by |")
        parts.append("|---|---|---|---|---:|---|")
        parts += [_row(member, tests) for member in members(family)]
    return "\n".join(parts) + "\n"


def families() -> list[type[Choice]]:
    """Return the families of an MoE layer, then those that ``nn`` and ``model`` define."""
    _modules_of(moesaic.moe)  # registers their classes
    modules = [*_modules_of(moesaic.nn), *_modules_of(moesaic.model)]
    others = [
        found
        for module in modules
        for found in vars(module).values()
        if isinstance(found, type) and Choice in found.__bases__
        if found.__module__ == module.__name__
    ]
    return [*OF_A_LAYER, *others, LanguageTag]


def _modules_of(package: ModuleType) -> list[ModuleType]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [importlib.import_module(one.name) for one in found]


def _row(member: type[Choice], tests: Tests) -> str:
    papers = dict.fromkeys(ARXIV.findall(inspect.getdoc(member) or ""))
    links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers)
    module = member.__module__.removeprefix("moesaic.").replace(".", "/")
    cells = (
        f"`{member.__name__}`",
        links or "-",
        _first_sentence(member).replace("|", "\\|"),
        f"`{module}.py`",
        str(lines_of_code(member)),
        ", ".join(_checks(member, tests)) or "-",
    )
    return f"| {' | '.join(cells)} |"


def _checks(member: type[Choice], tests: Tests) -> Iterator[str]:
    """Yield the tests that name a rule: those of its package by path, and the number of laws."""
    naming, package = tests.naming(member.__name__), member.__module__.split(".")[1]
    laws = {path for path in naming if path in tests.laws}
    for table in TABLES:
        if table in naming:
            laws |= set(tests.laws_over(table))
    for path in naming:
        if path.startswith(f"tests/{package}/") and Path(path).name.startswith("test_"):
            yield f"`{path.removeprefix('tests/')}`"
    if laws:
        yield f"{len(laws)} laws" if len(laws) > 1 else "1 law"


def _first_sentence(cls: type) -> str:
    text = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())
    found = SENTENCE.match(text)
    return ARXIV_IN_BRACKETS.sub("", found[0] if found else text).replace("``", "`")


def main(words: list[str]) -> int:
    """Write or check; return the exit code."""
    text = page()
    if "--check" in words:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        if not fresh:
            print(f"{PAGE.relative_to(ROOT)} is out of date: python tools/family.py")
        return int(not fresh)
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {sum(len(members(f)) for f in families())} members")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
