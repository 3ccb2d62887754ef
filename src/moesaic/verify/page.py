"""Page: a proof as Markdown."""

from collections.abc import Iterator, Mapping, Sequence

from moesaic.parallel.config import ParallelConfig
from moesaic.verify.compare import Tolerances
from moesaic.verify.prove import PlanResult, unequal_plans

TABLE_COLUMNS = ("ranks", "plan", "loss", "terms", "norm", "gradients", "weights", "edges", "verdict")


def to_markdown(results: Sequence[PlanResult]) -> str:
    """Return the table: a row for each plan, fewest ranks first."""
    rows = [TABLE_COLUMNS, tuple("-" * len(word) for word in TABLE_COLUMNS), *map(_table_row, results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summarize(results: Sequence[PlanResult]) -> str:
    """Return how many plans of how many ranks there were, and how many were equal."""
    worlds = sorted({verdict.world_size for verdict in results})
    bad = len(unequal_plans(results))
    ranks = ", ".join(map(str, worlds))
    end = "each equals one process" if not bad else f"{bad} not equal to one process"
    return f"{len(results)} plan{'s' * (len(results) != 1)} of {ranks} ranks: {end}"


def rejection_lines(rejected: Mapping[str, Sequence[ParallelConfig]]) -> Iterator[str]:
    """Yield a line for each reason for which plans were not run."""
    for why, plans in sorted(rejected.items(), key=lambda item: -len(item[1])):
        yield f"{len(plans)} refused: {why}"


def tolerances_text(tolerances: Tolerances) -> str:
    """Return the tolerances in a sentence."""
    return (
        f"Equal means: loss and norm within {tolerances.loss:.0e} of the value, gradients within "
        f"{tolerances.gradient:.0e} of the tensor's greatest, weights within {tolerances.weight:.0e} of "
        "how far the step moved them, the same number of edges to every expert and dropped, and "
        "copies of a value that have the same bits."
    )


def _table_row(result: PlanResult) -> tuple[str, ...]:
    found = result.differences
    measures = (
        ("-",) * 6
        if found is None
        else (
            *(
                f"{worst.value:.0e}"
                for worst in (found.loss, found.metrics, found.norm, found.gradient, found.weight)
            ),
            "same" if not found.expert_counts.value else f"{found.expert_counts.value:.0f} differ",
        )
    )
    word = "equal" if result.equal else "**" + "; ".join(result.problems) + "**"
    return (str(result.world_size), result.plan, *measures, word.replace("|", r"\|"))
