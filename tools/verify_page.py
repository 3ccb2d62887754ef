"""The matrix of docs/guide/verify.md: two models under every pair of degrees on 2, 4 and 8 ranks.

python tools/verify_page.py            minutes on two cores; writes between the page's marks
"""

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
    describe_machine,
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
MARKS = re.compile(r"(<!-- matrix: begin -->\n).*(<!-- matrix: end -->)", re.S)
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
    """Yield each section's text and its verdicts."""
    for section in SECTIONS:
        given, chosen = make_setup(section.run), section.plans
        lost, edges = count_dropped(run_reference(given))
        verdicts = list(_told(compare_plans(given, plans=chosen.valid), of=len(chosen.valid)))
        parts = [
            f"### {section.title}",
            f"```sh\n{section.command}\n```",
            f"{summarize(verdicts)}; {lost} of {edges:,} edges that were looked at are dropped.",
            to_markdown(verdicts),
            "\n".join(f"- {line}" for line in rejection_lines(chosen.rejected)),
        ]
        yield "\n\n".join(part for part in parts if part), verdicts


def _told(verdicts: Iterator[PlanResult], *, of: int) -> Iterator[PlanResult]:
    for number, verdict in enumerate(verdicts, start=1):
        print(
            number,
            "of",
            of,
            verdict.world_size,
            verdict.plan,
            verdict.problems or "equal",
            flush=True,
        )
        yield verdict


def write(page: Path, texts: Sequence[str], *, verdicts: Sequence[PlanResult]) -> None:
    """Put the sections between the marks of a page."""
    total = f"{len(verdicts)} plans, {len(unequal_plans(verdicts))} of them not equal; {describe_machine()}."
    allowed = [tolerances_text(make_setup(section.run).tolerances) for section in SECTIONS]
    body = "\n\n".join([total, *texts, *dict.fromkeys(allowed)])
    text = page.read_text(encoding="utf-8")
    page.write_text(MARKS.sub(lambda m: f"{m[1]}\n{body}\n\n{m[2]}", text), encoding="utf-8")


def main() -> None:
    """Run every section and write the page."""
    torch.set_num_threads(1)
    texts, verdicts = [], []
    for text, found in sections():
        texts.append(text)
        verdicts += found
    write(PAGE, texts, verdicts=verdicts)
    sys.exit(1 if unequal_plans(verdicts) else 0)


if __name__ == "__main__":
    main()
