"""The house rules find what they are for, in small bad houses."""

from pathlib import Path

import house
import measure
import pytest


def build(root: Path, **files: str) -> house.Repository:
    """A package whose files are given as ``core__x="..."`` for core/x.py."""
    for name, text in {"__init__": '"""Top."""\n', **files}.items():
        path = (
            root / "src" / "moesaic" / f"{name.replace('__', '/') if name[0] != '_' else name}.py"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return house.measure_repository(root)


UNUSED = ": nothing refers to it; limit 0"


def all_complaints(root: Path, **files: str) -> list[str]:
    return [str(finding) for finding in house.findings(build(root, **files))]


def complaints(root: Path, **files: str) -> list[str]:
    """All but those about definitions that nothing uses, which small examples are full of."""
    return [text for text in all_complaints(root, **files) if not text.endswith(UNUSED)]


GOOD = '''"""A good file (2101.03961)."""

from moesaic.core.y import z


def good(x: int, *, a: int, b: str = "") -> int:
    """Do."""
    if x:
        for _ in range(a):
            with z:
                while b:
                    pass
    return x  # TODO #12: better
'''


def test_a_good_house_has_nothing_to_say(tmp_path: Path) -> None:
    assert complaints(tmp_path, core__x=GOOD, core__y="z = 1\n") == []


def test_a_kernels_pointers_are_not_counted(tmp_path: Path) -> None:
    many = '(a, b, c, d, e, f, g):\n    """Do."""\n'
    kernels = f"@triton.jit\ndef f{many}\n@triton.jit(x=1)\ndef g{many}"
    assert complaints(tmp_path, core__x='"""Kernels."""\n' + kernels) == []
    assert complaints(tmp_path, core__x='"""Plain."""\n' + f"@other.jit\ndef f{many}") != []


BAD = {
    "a long file": ("x = 1\n" * 401, ":400: 401 lines of a file, limit 400"),
    "a long function": (
        "def f():\n" + "    x = 1\n" * 60,
        ":1: f: 61 lines of a function, limit 60",
    ),
    "many arguments": (
        "class C:\n    def f(self, a, b, /, c, *, d, e, f, g): ...\n",
        ":2: C.f: 7 arguments, limit 6",
    ),
    "deep nesting": (
        "def f():\n    if 1:\n        for x in y:\n            try:\n"
        "                while 1:\n                    pass\n"
        "            finally:\n                pass\n",
        ":1: f: 4 nesting, limit 3",
    ),
    "hasattr": ("x = hasattr(y, 'z')\n", ":1: hasattr: use a type instead; limit 0"),
    "getattr": (
        "x = (\n    getattr(y, 'z', None)\n)\n",
        ":2: getattr with a literal: use a type instead; limit 0",
    ),
    "a hidden import": (
        "def f():\n    import os\n    from moesaic import core\n",
        ":3: moesaic.core: import of our own inside a function; limit 0",
    ),
    "a loose end": (
        "x = 1  # TODO: better\n",
        ":1: # TODO: better: unfinished, and no issue number; limit 0",
    ),
    "a loose end in a docstring": (
        '"""Fine.\n\nFIXME this\n"""\n',
        ":3: FIXME this: unfinished, and no issue number; limit 0",
    ),
    "ranks in core": (
        "import torch.distributed as dist\n",
        ":1: torch.distributed: must not import torch.distributed; limit 0",
    ),
    "ranks in core, by name": (
        "import torch\n\nx = torch.distributed.get_rank()\n",
        ":3: torch.distributed: must not import torch.distributed; limit 0",
    ),
    "ranks in core, from torch": (
        "from torch import distributed\n",
        ":1: torch.distributed: must not import torch.distributed; limit 0",
    ),
    "a machine's path": (
        "x = '" + "/home" + "/me/data'\n",
        ":1: a path of one machine; limit 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_each_fault_is_named_with_its_place_and_the_limit(tmp_path: Path, name: str) -> None:
    text, expected = BAD[name]
    assert complaints(tmp_path, core__x=text) == [f"src/moesaic/core/x.py{expected}"]


def test_ranks_are_allowed_outside_core_and_the_plan(tmp_path: Path) -> None:
    text = "import torch.distributed as dist\n"
    assert complaints(tmp_path, distributed__world=text) == []
    assert len(complaints(tmp_path, distributed__parallel_plan=text)) == 1


@pytest.mark.parametrize(
    "files",
    [
        {"a__x": "from moesaic.a import y\n", "a__y": "import moesaic.a.x\n"},
        {"a__x": "from moesaic.a.y import f\n", "a__y": "from moesaic.a.x import g\n"},
    ],
)
def test_a_cycle_is_found(tmp_path: Path, files: dict[str, str]) -> None:
    assert complaints(tmp_path, **files) == [
        "src/moesaic/a/x.py:1: import cycle of moesaic.a.x, moesaic.a.y; limit 0"
    ]


def test_a_long_way_round_is_a_cycle_and_a_diamond_is_none(tmp_path: Path) -> None:
    ring = {"a": "import moesaic.b", "b": "import moesaic.c", "c": "import moesaic.a"}
    assert house.cycles(build(tmp_path / "ring", **ring).files) == [
        ["moesaic.a", "moesaic.b", "moesaic.c"]
    ]
    diamond = {"a": "import moesaic.b, moesaic.c", "b": "import moesaic.d", "c": "import moesaic.d"}
    assert house.cycles(build(tmp_path / "diamond", **diamond, d="").files) == []


def test_a_paper_must_be_listed_once_there_is_a_list(tmp_path: Path) -> None:
    text = '"""See 2101.03961 and arXiv:1701.06538, not 1234.5 or 3.2101.03961."""\n'
    assert complaints(tmp_path, moe__x=text) == []
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "papers.md").write_text("| 2101.03961 | moe/x.py |")
    assert complaints(tmp_path, moe__x=text) == [
        "src/moesaic/moe/x.py:1: arXiv:1701.06538 is not in docs/papers.md"
    ]


def test_a_definition_that_nothing_refers_to_is_found(tmp_path: Path) -> None:
    text = (
        "LIMIT = 1\n\n\ndef used(): ...\n\n\ndef alone(): return used()\n\n\n"
        "class C:\n    def m(self): ...\n\n    def n(self): ...\n\n    def __len__(self): ...\n\n\n"
        "class M(Module):\n    def forward(self): return C().n()\n"
    )
    assert all_complaints(tmp_path, a__x=text, a__y="from moesaic.a.x import M\n") == [
        f"src/moesaic/a/x.py:{line}: {name}{UNUSED}"
        for line, name in ((1, "LIMIT"), (7, "alone"), (11, "C.m"))
    ]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("benchmarks/x.py", "from moesaic.a.x import f\n"),
        ("tools/x.py", "call('f')\n"),
        ("docs/guide/x.md", "```python\nf()\n```\n"),
    ],
)
def test_a_use_outside_the_package_counts_and_one_in_a_test_does_not(
    tmp_path: Path, path: str, text: str
) -> None:
    for place, left in ((f"tests/{Path(path).name}", 1), (path, 0)):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)
        assert len(all_complaints(tmp_path, a__x="def f(): ...\n")) == left


def test_what_a_decorator_registers_and_a_member_of_a_family_are_used(tmp_path: Path) -> None:
    text = "@app.command()\ndef f(): ...\n\n\nclass A(Choice): ...\n\n\nclass B(A): ...\n"
    assert all_complaints(tmp_path, a__x=text) == []


def test_a_name_has_one_meaning(tmp_path: Path) -> None:
    files = {"a__x": "class C: ...\nclass _D: ...\n", "b__y": "class C: ...\nclass _D: ...\n"}
    assert complaints(tmp_path, **files, b__x="", a__config="", b__config="") == [
        "src/moesaic/a/x.py:1: C is defined in src/moesaic/b/y.py too: one name, one meaning",
        "src/moesaic/a/x.py:1: x.py is defined in src/moesaic/b/x.py too: one name, one meaning",
    ]


def measured(tmp_path: Path, text: str) -> measure.File:
    return build(tmp_path, x=text).files[-1]


def test_elif_is_not_deeper_and_an_inner_function_starts_anew(tmp_path: Path) -> None:
    text = (
        "def f(x):\n    if x == 1:\n        pass\n    elif x == 2:\n        pass\n"
        "    else:\n        def g():\n            if 1:\n"
        "                if 2:\n                    pass\n"
    )
    assert {f.name: f.nesting for f in measured(tmp_path, text).functions} == {"f": 1, "f.g": 2}


def test_code_lines_are_neither_blank_nor_comment_nor_docstring(tmp_path: Path) -> None:
    text = (
        '"""Doc.\n\nMore.\n"""\n\n# why\nx = """a\nb"""  # text\n\n\n'
        'def f():\n    """Doc."""\n    return (\n        1\n    )\n'
    )
    assert measured(tmp_path, text).code_lines == 2 + 1 + 3
    assert measured(tmp_path, text).lines == 15


def test_a_typed_function_has_every_type(tmp_path: Path) -> None:
    text = (
        "class C:\n    def a(self, x: int, *rest: int, **more: int) -> int: ...\n"
        "    def b(self, x) -> int: ...\n    def c(self): ...\n"
        "    def d(self, **more) -> int: ...\n"
        "    @staticmethod\n    def e(x) -> int: ...\n"
    )
    functions = measured(tmp_path, text).functions
    assert [f.typed for f in functions] == [True, False, False, False, False]
    assert [f.arguments for f in functions] == [1, 1, 0, 0, 1]


def test_verbs_have_options_not_arguments(tmp_path: Path) -> None:
    text = "@app.command()\ndef f(a, b, c, d, e, f, g): ...\n"
    assert measured(tmp_path, text).functions[0].arguments == 0


def test_what_is_public_is_described(tmp_path: Path) -> None:
    text = '"""Doc."""\n\n\ndef f(): ...\n\n\nclass C:\n    """Doc."""\n\n\ndef _g(): ...\n'
    assert measured(tmp_path, text).described == (True, False, True)


def test_the_table_sets_us_beside_every_anchor(tmp_path: Path) -> None:
    rows = house.comparison(build(tmp_path, core__x=GOOD))
    assert rows[0]["code base"] == "**moesaic**"
    assert rows[0]["files"] == "2"
    assert rows[0]["longest function"] == "8"
    assert rows[0]["fully typed"] == "100%"
    assert len(rows) == 22
    assert {"torchtitan 2026-08", "Megatron-LM 2026-08"} <= {r["code base"] for r in rows}
    widths = {len(line) for line in house.markdown(rows).splitlines()}
    assert len(widths) == 1


def test_contributing_is_rewritten_between_its_markers_alone(tmp_path: Path) -> None:
    page = tmp_path / "CONTRIBUTING.md"
    begin, end = house.MARKERS
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    house.write_between(page, "new")
    house.write_between(page, "new")
    assert page.read_text(encoding="utf-8") == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="needs the markers"):
        house.write_between(page, "new")


def test_a_fault_is_exit_code_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    build(tmp_path, core__x=GOOD)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "x.py").write_text("from moesaic.core.x import good\n")
    assert house.main(["--quiet"]) == 0
    build(tmp_path, core__x="def f(x):\n    return hasattr(x, 'y')\n")
    assert house.main([]) == 1
