"""The names and the prose of the project are the field's: no old name, no personification."""

import ast
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
from unused import defined_twice

ROOT = Path(__file__).parents[1]
CODE = sorted(
    p for d in ("src", "tests", "benchmarks", "examples", "tools") for p in (ROOT / d).rglob("*.py")
)
NATIVE = sorted(p for p in (ROOT / "src").rglob("*") if p.suffix in (".c", ".h"))
HISTORY = {"CHANGELOG.md", "log.md"}  # they tell what was, in the words of then
PAGES = sorted(
    p for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if p.name not in HISTORY
)
# the tables that read configs and checkpoints of earlier versions, and their tests
UPGRADES = {
    *("src/moesaic/core/config_upgrade.py", "src/moesaic/checkpoint/manifest.py"),
    *("tests/core/test_config_upgrade.py", "tests/checkpoint/test_full_checkpoint_load.py"),
}
OWN = {Path(__file__), *(ROOT / path for path in UPGRADES)}
# names of earlier versions, and the term that replaced each; `config upgrade` has its own table
OLD_NAMES = {
    "Journey": "ExpertDispatch", "journey": "dispatch", "Reach": "ContextParallel",
    "Crew": "TensorParallelGroup", "crew": "tensor_parallel_group", "Solo": "NoTensorParallel",
    "lanes": "tensor ranks", "Looking": "AttentionBackend", "LookHere": "LocalAttention",
    "looking": "attention_backend", "Leg": "BlockRange", "leg": "block_range",
    "Blueprint": "ModelConfig", "TransformerConfig": "ModelConfig", "blueprint": "config",
    "Arrangement": "BlockLayout", "Beside": "SharedExperts", "beside": "shared_experts",
    "NothingBeside": "NoSharedExperts", "Passage": "DispatchProjection", "Among": "ExpertGroups",
    "BestGroups": "TopGroups", "Parcel": "DispatchHandle", "parcel": "handle",
    "Lend": "AdaptiveExperts", "TwoHops": "HierarchicalAllToAll", "InChunks": "ChunkedAllToAll",
    "Handing": "StageIO", "Carry": "RouterState", "Learner": "StatefulRule", "hear": "accumulate",
    "Deal": "SequenceSharding", "Spread": "ParallelModel", "Laid": "Placement", "laid": "placement",
    "Holding": "RankParameters", "holding": "rank_parameters", "Book": "HeartbeatFile",
    "Verdict": "HangReport", "Journal": "EventLog", "Board": "ProgressDisplay",
    "refuses": "problems", "alike": "simulate", "rehearse": "dry_run", "on_first": "run_on_rank0",
    "UNSAYABLE": "SUPPRESSED_TOKENS", "Ordeal": "FaultTrial", "Endured": "FaultResult",
    "settle": "resolve_conflicts", "Answer": "MoEOutput",
    "heard": "accumulated", "told": "the value that is meant", "said": "the value that is meant",
    "bend": "activation_forward", "hire": "spawn_worker", "Bare": "ExpertWeights",
}  # fmt: skip
PERSON = re.compile(
    r"\b((?<!we )knows?|knew|believes?|travels?|travelled|hears?|heard|whoever|remembers?|forgets?"
    r"|comes? home|(?:is|are) lent|house's|says nothing|says so)\b",
    re.IGNORECASE,
)


@cache
def read_module(path: Path) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Return the old names in a module, and the lines that are no code, each with its number."""
    names, lines = [], []
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            line = token.start[0]
            if token.type == tokenize.NAME and token.string in OLD_NAMES:
                names.append((line, token.string))
            elif token.type in (tokenize.COMMENT, tokenize.STRING):
                lines += enumerate(token.string.splitlines(), start=line)
    return names, lines


def prose(path: Path) -> list[tuple[int, str]]:
    """Return the lines that a reader reads: of a page all but code, of a module what is no code."""
    if path.suffix == ".py":
        return read_module(path)[1]
    text = path.read_text("utf-8")
    blank = re.sub(r"```.*?```", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return list(enumerate(blank.splitlines(), start=1))


def where(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def test_no_public_class_and_no_module_name_is_defined_twice():
    sources = {p: ast.parse(p.read_text("utf-8")) for p in (ROOT / "src").rglob("*.py")}
    assert defined_twice(sources) == {}


def test_no_old_name_is_left_in_code():
    left = [
        where(path, line, f"{word}: {OLD_NAMES[word]}")
        for path in CODE
        if path not in OWN
        for line, word in read_module(path)[0]
    ]
    assert left == []


def test_no_old_name_is_left_in_prose():
    coined = [name for name in OLD_NAMES if name[0].isupper() and name not in ("Answer", "Board")]
    pattern = re.compile(r"\b(" + "|".join(coined) + r")\b")
    glossary = ROOT / "docs" / "glossary.md"  # TransformerConfig is Megatron-Core's name
    left = [
        where(path, line, found.group())
        for path in (*PAGES, *CODE, *NATIVE)
        if path not in OWN
        for line, text in prose(path)
        for found in pattern.finditer(text)
        if path != glossary or found.group() != "TransformerConfig"
    ]
    assert left == []


@pytest.mark.parametrize("kind", ["pages", "package"])
def test_no_part_of_the_program_is_described_as_a_person(kind):
    package = [p for p in CODE if (ROOT / "src") in p.parents and p not in OWN]
    paths = PAGES if kind == "pages" else package
    left = [
        where(path, line, text.strip())
        for path in paths
        for line, text in prose(path)
        if PERSON.search(text)
    ]
    assert left == []


def test_every_file_that_a_page_names_is_there():
    pattern = re.compile(
        r"(?<![\w/.-])((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|c|h|json|toml|yaml|md))\b"
    )
    roots = (ROOT, ROOT / "src" / "moesaic", ROOT / "tests", ROOT / "docs", ROOT / "docs" / "guide")
    left = [
        where(path, line, found)
        for path in PAGES
        for line, text in enumerate(path.read_text("utf-8").splitlines(), start=1)
        for found in pattern.findall(text)
        if not any((root / found).exists() for root in (*roots, path.parent))
        and not found.startswith(("runs/", "data/corpora/", "megatron/"))
    ]
    assert left == []
