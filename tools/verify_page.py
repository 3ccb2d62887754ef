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

from moesaic.recipes.find import find
from moesaic.train.run import Run
from moesaic.verify.page import matrix, refusals, summary, tolerances
from moesaic.verify.plans import Plans
from moesaic.verify.prove import Verdict, dropped, failed, machine, plans, prove, reference, setting
from moesaic.verify.small import small

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
        return small(find(self.recipe, changes=list(self.changes))).run

    @property
    def plans(self) -> Plans:
        """The plans of its table."""
        return plans(self.run, world=WORLD).paired()

    @property
    def command(self) -> str:
        """What a user types for the same table."""
        changes = " ".join(f"\\\n    --set {shlex.quote(change)}" for change in self.changes)
        return f"moesaic verify {self.recipe} --world {WORLD} {changes}"


SECTIONS = (
    Section(
        "An encoder-decoder: top-1, capacity, random token selection",
        "demo",
        (
            "model.moe.limit=Capacity(factor=1.0, minimum=1)",
            "model.moe.balance=[{kind: SwitchBalance}, {kind: RouterZ}]",
            "model.dropout=0.1",
        ),
    ),
    Section(
        "A decoder: dropless top-2, a shared expert",
        "tiny-lm",
        (
            "model.moe.experts=8",
            "model.moe.beside=SharedExperts()",
            "model.attention.heads=8",
            "model.attention.kv_heads=4",
            "optimizer=AdamW(lr=0.01)",
        ),
    ),
)


def sections() -> Iterator[tuple[str, list[Verdict]]]:
    """Yield each section's text and its verdicts."""
    for section in SECTIONS:
        given, chosen = setting(section.run), section.plans
        lost, edges = dropped(reference(given))
        verdicts = list(_told(prove(given, chosen=chosen.fit), of=len(chosen.fit)))
        parts = [
            f"### {section.title}",
            f"```sh\n{section.command}\n```",
            f"{summary(verdicts)}; {lost} of {edges:,} edges that were looked at are dropped.",
            matrix(verdicts),
            "\n".join(f"- {line}" for line in refusals(chosen.refused)),
        ]
        yield "\n\n".join(part for part in parts if part), verdicts


def _told(verdicts: Iterator[Verdict], *, of: int) -> Iterator[Verdict]:
    for number, verdict in enumerate(verdicts, start=1):
        print(number, "of", of, verdict.ranks, verdict.plan, verdict.wrong or "equal", flush=True)
        yield verdict


def write(page: Path, texts: Sequence[str], *, verdicts: Sequence[Verdict]) -> None:
    """Put the sections between the marks of a page."""
    total = f"{len(verdicts)} plans, {len(failed(verdicts))} of them not equal; {machine()}."
    allowed = [tolerances(setting(section.run).allowed) for section in SECTIONS]
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
    sys.exit(1 if failed(verdicts) else 0)


if __name__ == "__main__":
    main()
