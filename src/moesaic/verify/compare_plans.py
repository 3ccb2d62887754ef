"""Prove: make the same steps under many plans, and say which of them equal one process.

Page: a proof as Markdown.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed

from moesaic.core.errors import ConfigError
from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks
from moesaic.model.transformer import Transformer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.train.run import Run
from moesaic.train.run_checks import pipeline_has_enough_micro_batches
from moesaic.verify.enumerate_plans import PlanSet, describe_plan, enumerate_plans
from moesaic.verify.record_run import ModelShapes, TrainingTrace, model_shapes, record_run
from moesaic.verify.synthetic_batches import SyntheticShape
from moesaic.verify.trace_differences import Tolerances, TraceDifferences, compare_traces

SINGLE_PROCESS_PLAN = ParallelConfig()


@dataclass(frozen=True, slots=True)
class PlanResult:
    """What became of one plan: its differences, or why it did not end; nothing wrong is equal."""

    world_size: int
    plan: str
    parallel: ParallelConfig
    differences: TraceDifferences | None
    problems: tuple[str, ...]
    step_s: float = 0.0

    @property
    def equal(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class VerifySetup:
    """What is run: a small run and its model, made-up batches, and how many steps.

    A plan may take ``timeout_s``. ``collective_timeout_s`` is how long a collective waits: a plan whose ranks
    disagree about what comes next ends after it.
    """

    run: Run
    model: ModelShapes
    shape: SyntheticShape
    tolerances: Tolerances
    steps: int = 3
    timeout_s: float = 120.0
    collective_timeout_s: float = 20.0


def make_setup(run: Run, *, steps: int = 3, timeout_s: float = 120.0) -> VerifySetup:
    """Return the setting of a run, its batches of the model's kind."""
    return VerifySetup(
        run,
        model_shapes(run),
        SyntheticShape(source=run.model.encoder.layers > 0),
        Tolerances.for_run(run),
        steps=steps,
        timeout_s=timeout_s,
        collective_timeout_s=min(20.0, timeout_s),
    )


def plans_up_to(run: Run, *, world_size: int) -> PlanSet:
    """Return every plan for 2 ranks and for each number up to ``world`` that divides it."""
    worlds = [ranks for ranks in range(2, world_size + 1) if world_size % ranks == 0]
    return enumerate_plans(worlds, run=run)


def configured_plan(run: Run, *, world_size: int) -> PlanSet:
    """Return the run's own plan for so many ranks."""
    with torch.device("meta"):
        model = Transformer(run.model)
    parallel = run.parallel.replace(plan=run.parallel.plan.resolve(world_size))
    check_parallel(model, parallel=parallel, plan=parallel.plan)
    problems = list(pipeline_has_enough_micro_batches(run.replace(parallel=parallel)))
    if problems:
        raise ConfigError(problems)
    return PlanSet((parallel,), {})


def run_reference(setup: VerifySetup) -> TrainingTrace:
    """Make the steps in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every rank does
    try:
        return _record(setup, SINGLE_PROCESS_PLAN)
    finally:
        torch.set_num_threads(threads)


def compare_plans(setup: VerifySetup, *, plans: Sequence[ParallelConfig]) -> Iterator[PlanResult]:
    """Yield a verdict on each plan, in the order of their numbers of ranks.

    The plans of one number of ranks share a fork of this process, whose memory must hold no CUDA
    context. A plan that raises, dies or hangs is a verdict too.
    """
    truth = run_reference(setup)
    for ranks in sorted({parallel.plan.world_size for parallel in plans}):
        several = [parallel for parallel in plans if parallel.plan.world_size == ranks]

        def one(parallel: ParallelConfig) -> TrainingTrace | None:
            trace = _record(setup, parallel)
            return None if distributed.get_rank() else trace

        outcomes = run_cases_on_ranks(
            ranks,
            one,
            several,
            timeout_s=setup.timeout_s,
            collective_timeout_s=setup.collective_timeout_s,
        )
        for parallel, outcome in zip(several, outcomes, strict=True):
            yield _plan_result(parallel, outcome, reference=truth, tolerances=setup.tolerances)


def _record(setup: VerifySetup, parallel: ParallelConfig) -> TrainingTrace:
    model, shape = setup.model, setup.shape
    return record_run(setup.run, parallel=parallel, shape=shape, steps=setup.steps, model=model)


def _plan_result(
    parallel: ParallelConfig,
    outcome: list[Any] | RankError,
    *,
    reference: TrainingTrace,
    tolerances: Tolerances,
) -> PlanResult:
    ranks, plan = parallel.plan.world_size, describe_plan(parallel)
    if isinstance(outcome, RankError):
        return PlanResult(ranks, plan, parallel, None, (f"failed: {_last_line(str(outcome))}",))
    found = compare_traces(reference, other=outcome[0])
    step_s = min(outcome[0].seconds)
    return PlanResult(ranks, plan, parallel, found, tuple(found.exceeding(tolerances)), step_s)


def _last_line(text: str) -> str:
    """Return which rank it was and the last line of its traceback, or the whole of a sentence."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1].strip()}"


def describe_machine() -> str:
    """Return what the proof was run on, in a few words."""
    return f"{os.cpu_count()} CPU cores, torch {torch.__version__}, gloo"


def count_dropped(trace: TrainingTrace) -> tuple[int, int]:
    """Return how many edges of the traced micro-batches were dropped, and how many there were."""
    counts = [count for step in trace.expert_counts for count in step.values()]
    return sum(int(c[-1]) for c in counts), sum(int(c.sum()) for c in counts)


def unequal_plans(results: Iterable[PlanResult]) -> list[PlanResult]:
    """Return those that are not equal."""
    return [verdict for verdict in results if not verdict.equal]


TABLE_COLUMNS = (
    "ranks",
    "plan",
    "loss",
    "terms",
    "norm",
    "gradients",
    "weights",
    "edges",
    "verdict",
)


def to_markdown(results: Sequence[PlanResult]) -> str:
    """Return the table: a row for each plan, fewest ranks first."""
    rows = [
        TABLE_COLUMNS,
        tuple("-" * len(word) for word in TABLE_COLUMNS),
        *map(_table_row, results),
    ]
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
