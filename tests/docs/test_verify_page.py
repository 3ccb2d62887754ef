"""The page on verify holds the plans that there are, none that differs, and says what it is of."""

import re

import pytest
from verify_page import PAGE, SECTIONS, Section

from moesaic.parallel.config import Parallel
from moesaic.verify.page import summary
from moesaic.verify.plans import named
from moesaic.verify.prove import Verdict

ROW = re.compile(r"^\| (\d+) \| ([^|]+) \|.*\| ([^|]+) \|$", re.M)


def part(section: Section) -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(f"### {section.title}\n")[2].partition("\n### ")[0]


def about(parallel: Parallel) -> tuple[int, str]:
    return parallel.plan.world, named(parallel)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.recipe)
def test_the_page_lists_the_plans_that_exist_and_each_is_equal(section: Section) -> None:
    rows = ROW.findall(part(section))
    assert [verdict for _, _, verdict in rows] == ["equal"] * len(rows)
    chosen = section.plans.fit
    listed = sorted((int(ranks), plan) for ranks, plan, _ in rows)
    assert listed == sorted(map(about, chosen)), "python tools/verify_page.py writes it again"
    assert section.command in part(section)


def test_the_page_has_forty_plans_and_more() -> None:
    assert sum(len(ROW.findall(part(section))) for section in SECTIONS) >= 40


def test_a_summary_counts_what_is_not_equal() -> None:
    plan = Parallel()
    both = [Verdict(2, "a", plan, None, ()), Verdict(4, "b", plan, None, ("failed: x",))]
    assert summary(both) == "2 plans of 2, 4 ranks: 1 not equal to one process"
