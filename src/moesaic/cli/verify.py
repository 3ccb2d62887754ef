"""``moesaic verify``: does this config train alike, however it is laid over ranks?"""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from moesaic.cli.common import Json, Set, Use, answer, talk, use, verb_app
from moesaic.core.errors import UserError
from moesaic.recipes.find import find
from moesaic.verify.page import matrix, refusals, summary, tolerances
from moesaic.verify.prove import Setting, Verdict, failed, own, plans, prove, setting
from moesaic.verify.small import small

app = verb_app()


class Which(StrEnum):
    """Which of the plans that fit."""

    PAIRS = "pairs"
    ALL = "all"
    OWN = "own"


@app.command()
def verify(
    which: Annotated[str, typer.Argument(metavar="RECIPE|CONFIG", help="What is to be trained.")],
    *,
    world: Annotated[int, typer.Option(min=2, help="The most ranks; its divisors too.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps under each plan.")] = 3,
    choice: Annotated[
        Which,
        typer.Option("--plans", help="All, so few that any two degrees meet, or the config's own."),
    ] = Which.PAIRS,
    changes: Set = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds that one plan may take.")] = 120,
    out: Annotated[Path | None, typer.Option(help="Write the matrix there, as Markdown.")] = None,
    files: Use = None,
    as_json: Json = False,
) -> None:
    """Train a small copy of a config under every plan, and compare with one process.

    Widths and the vocabulary are made small and the text is made up; layers, rules, heads, experts
    per token and the optimizer are your own. Ends with 1 if any plan differs.

    Example: [cyan]moesaic verify tiny --world 4[/]

    One's own plan: [cyan]moesaic verify mine.yaml --world 8 --plans own[/]
    """
    use(files)
    shrunk = small(find(which, changes=changes or []))
    given = setting(shrunk.run, steps=steps, timeout_s=timeout_s)
    found = own(shrunk.run, world=world) if choice is Which.OWN else plans(shrunk.run, world=world)
    chosen = found.paired() if choice is Which.PAIRS else found
    if not chosen.fit:
        raise UserError(f"no plan of {world} ranks fits: {'; '.join(refusals(found.refused))}")
    talk.print(f"made small: {escape('; '.join(shrunk.changed))}", style="dim", highlight=False)
    verdicts: list[Verdict] = []
    for verdict in prove(given, chosen=chosen.fit):
        verdicts.append(verdict)
        _tell(verdict, of=len(chosen.fit), number=len(verdicts))
    text = _page(verdicts, given=given, left=list(refusals(found.refused)))
    if out is not None:
        out.write_text(text, encoding="utf-8")
    value = _plain(verdicts) | {"changed": shrunk.changed, "plans that fit": len(found.fit)}
    answer(value, as_json=as_json, show=lambda console: _show(text, console))
    if failed(verdicts):
        raise typer.Exit(1)


def _tell(verdict: Verdict, *, of: int, number: int) -> None:
    word = "equal" if verdict.equal else "; ".join(verdict.wrong)
    style = "dim" if verdict.equal else "red"
    ranks = f"{number}/{of} {verdict.ranks} ranks, {verdict.plan}: {word}"
    talk.print(escape(ranks), style=style, highlight=False)


def _page(verdicts: list[Verdict], *, given: Setting, left: list[str]) -> str:
    refused = "".join(f"- {line}\n" for line in left)
    parts = [matrix(verdicts), f"{summary(verdicts)}. {tolerances(given.allowed)}", refused]
    return "\n\n".join(part for part in parts if part).rstrip() + "\n"


def _show(text: str, console: Console) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True, end="")


def _plain(verdicts: list[Verdict]) -> dict[str, Any]:
    rows = [
        {
            "ranks": v.ranks,
            "plan": v.plan,
            "parallel": v.parallel.plain(),
            "found": None if v.found is None else asdict(v.found),
            "wrong": v.wrong,
            "step_s": v.step_s,
        }
        for v in verdicts
    ]
    return {"summary": summary(verdicts), "plans": rows}
