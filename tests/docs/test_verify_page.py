"""The page on verify: every degree and option has a row, and every row is equal."""

import re

import pytest
from verify_page import PAGE, SECTIONS, Section

from moesaic.core.config import Choice
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.parallel.config import ParallelConfig
from moesaic.verify.compare_plans import PlanResult, summarize
from moesaic.verify.enumerate_plans import APPLIES_TO, describe_plan

ROW = re.compile(r"^\| (\d+) \| ([^|]+) \|.*\| ([^|]+) \|$", re.M)
AXES = ("pipe", "data", "context", "tensor", "expert", "expert_tensor")


def rows(section: Section) -> list[tuple[str, str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    return ROW.findall(text.partition(f"### {section.title}\n")[2].partition("\n### ")[0])


def families() -> list[tuple[str, type[Choice]]]:
    fields = ((name, ParallelConfig.model_fields[name].annotation) for name in APPLIES_TO)
    return [(n, f) for n, f in fields if isinstance(f, type) and issubclass(f, Choice)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.recipe)
def test_each_plan_of_the_page_is_equal(section: Section) -> None:
    found = rows(section)
    assert len(found) >= 40
    assert [(plan, result) for _, plan, result in found if result != "equal"] == []
    assert {ranks for ranks, _, _ in found} == {"2", "4", "8"}
    assert section.command in PAGE.read_text(encoding="utf-8")


def test_every_degree_and_every_option_has_a_row() -> None:
    plans = [plan for section in SECTIONS for _, plan, _ in rows(section)]
    words = [f"{axis} {degree}" for axis in AXES for degree in (2, 4)]
    words += [f"zero {stage}" for stage in (1, 2, 3)]
    for name, family in families():
        usual = type(ParallelConfig.model_fields[name].default).__name__
        words += [f"{name} {m}" for m in family.members if m != usual]
    lacking = [word for word in words if not any(word in plan.split(", ") for plan in plans)]
    assert lacking == [], "python tools/verify_page.py writes the page again"


def test_default_options_are_not_named() -> None:
    assert describe_plan(ParallelConfig(plan=ParallelPlan(data=2, expert=2))) == "data 2, expert 2"


def test_a_summary_counts_what_is_not_equal() -> None:
    plan = ParallelConfig()
    both = [PlanResult(2, "a", plan, None, ()), PlanResult(4, "b", plan, None, ("failed: x",))]
    assert summarize(both) == "2 plans of 2, 4 ranks: 1 not equal to one process"
