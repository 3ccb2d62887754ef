"""Page: a proof as Markdown."""

from collections.abc import Iterator, Mapping, Sequence

from moesaic.parallel.config import Parallel
from moesaic.verify.compare import Tolerances
from moesaic.verify.prove import Verdict, failed

HEAD = ("ranks", "plan", "loss", "terms", "norm", "gradients", "weights", "edges", "verdict")


def matrix(verdicts: Sequence[Verdict]) -> str:
    """Return the table: a row for each plan, fewest ranks first."""
    rows = [HEAD, tuple("-" * len(word) for word in HEAD), *map(_row, verdicts)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return how many plans of how many ranks there were, and how many were equal."""
    worlds = sorted({verdict.ranks for verdict in verdicts})
    bad = len(failed(verdicts))
    ranks = ", ".join(map(str, worlds))
    end = "each equals one process" if not bad else f"{bad} not equal to one process"
    return f"{len(verdicts)} plan{'s' * (len(verdicts) != 1)} of {ranks} ranks: {end}"


def refusals(refused: Mapping[str, Sequence[Parallel]]) -> Iterator[str]:
    """Yield a line for each reason for which plans were not run."""
    for why, plans in sorted(refused.items(), key=lambda item: -len(item[1])):
        yield f"{len(plans)} refused: {why}"


def tolerances(allowed: Tolerances) -> str:
    """Return the tolerances in a sentence."""
    return (
        f"Equal means: loss and norm within {allowed.loss:.0e} of the value, gradients within "
        f"{allowed.gradient:.0e} of the tensor's greatest, weights within {allowed.weight:.0e} of "
        "how far the step moved them, the same number of edges to every expert and dropped, and "
        "copies of a value that have the same bits."
    )


def _row(verdict: Verdict) -> tuple[str, ...]:
    found = verdict.found
    measures = (
        ("-",) * 6
        if found is None
        else (
            *(
                f"{worst.value:.0e}"
                for worst in (found.loss, found.terms, found.norm, found.gradient, found.weight)
            ),
            "same" if not found.edges.value else f"{found.edges.value:.0f} differ",
        )
    )
    word = "equal" if verdict.equal else "**" + "; ".join(verdict.wrong) + "**"
    return (str(verdict.ranks), verdict.plan, *measures, word.replace("|", r"\|"))
