"""Write the tables of docs/guide/verify.md: two models under every pair of degrees, 2 to 8 ranks.

python tools/verify_page.py            minutes on two cores; writes between the markers of the page
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.recipes.lookup import find_recipe
from moesaic.train.run import Run
from moesaic.verify.compare_plans import (
    PlanResult,
    compare_plans,
    count_dropped,
    make_setup,
    plans_up_to,
    rejection_lines,
    run_reference,
    summarize,
    to_markdown,
    tolerances_text,
    unequal_plans,
)
from moesaic.verify.enumerate_plans import PlanSet
from moesaic.verify.shrink_config import shrink_config

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "verify.md"
MARKS = re.compile(r"(<!-- plans: begin -->\n).*(<!-- plans: end -->)", re.S)
WORLD = 8


@dataclass(frozen=True, slots=True)
class Section:
    """One model of the page: its title, a recipe, and what is changed in it."""

    title: str
    recipe: str
    changes: tuple[str, ...]

    @property
    def run(self) -> Run:
        """The small run."""
        return shrink_config(find_recipe(self.recipe, changes=list(self.changes))).run

    @property
    def plans(self) -> PlanSet:
        """The plans of its table."""
        return plans_up_to(self.run, world_size=WORLD).pairwise_cover()

    @property
    def command(self) -> str:
        """What a user types for the same table."""
        changes = " ".join(f"\\\n    --set {shlex.quote(change)}" for change in self.changes)
        return f"moesaic verify {self.recipe} --world-size {WORLD} {changes}"


SECTIONS = (
    Section(
        "An encoder-decoder: top-1, capacity, random token selection",
        "demo",
        (
            "model.moe.limit=Capacity(factor=1.0, minimum=1)",
            "model.moe.balance=[{kind: SwitchBalance}, {kind: RouterZLoss}]",
            "model.dropout=0.1",
        ),
    ),
    Section(
        "A decoder: dropless top-2, a shared expert",
        "tiny-lm",
        (
            "model.moe.experts=8",
            "model.moe.shared_experts=SharedExperts()",
            "model.attention.heads=8",
            "model.attention.kv_heads=4",
            "optimizer=AdamW(lr=0.01)",
        ),
    ),
)


def sections() -> Iterator[tuple[str, list[PlanResult]]]:
    """Yield the text of each section and its results."""
    for section in SECTIONS:
        setup, plans = make_setup(section.run), section.plans
        reference = run_reference(setup)
        dropped, routed = count_dropped(reference)
        found = compare_plans(setup, plans=plans.valid, reference=reference)
        results = list(_progress(found, count=len(plans.valid)))
        parts = [
            f"### {section.title}",
            f"```sh\n{section.command}\n```",
            f"{summarize(results)}; {dropped} of {routed:,} recorded token copies are dropped.",
            to_markdown(results),
            "\n".join(f"- {line}" for line in rejection_lines(plans.rejected)),
        ]
        yield "\n\n".join(part for part in parts if part), results


def _progress(results: Iterator[PlanResult], *, count: int) -> Iterator[PlanResult]:
    for number, result in enumerate(results, start=1):
        outcome = result.problems or "equal"
        print(number, "of", count, result.world_size, result.plan, outcome, flush=True)
        yield result


def write(page: Path, texts: Sequence[str], *, results: Sequence[PlanResult]) -> None:
    """Put the sections between the markers of a page."""
    unequal = len(unequal_plans(results))
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}, gloo"
    total = f"{len(results)} plans, {unequal} of them not equal; {machine}."
    tolerances = [tolerances_text(make_setup(section.run).tolerances) for section in SECTIONS]
    body = "\n\n".join([total, *texts, *dict.fromkeys(tolerances)])
    text = page.read_text(encoding="utf-8")
    page.write_text(MARKS.sub(lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text), encoding="utf-8")


def main() -> None:
    """Run every section and write the page."""
    torch.set_num_threads(1)
    texts, results = [], []
    for text, found in sections():
        texts.append(text)
        results += found
    write(PAGE, texts, results=results)
    sys.exit(1 if unequal_plans(results) else 0)


if __name__ == "__main__":
    main()
