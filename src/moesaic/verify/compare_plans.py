"""Compare parallel plans: the same training steps under each plan and in a single process.

The result of a plan is equal to the single process within the tolerances of float32 sums in another
order; a plan that raises, dies or hangs is a result too. ``to_markdown`` makes a table of results.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed

from moesaic.core.errors import ConfigError
from moesaic.core.markdown import markdown_table
from moesaic.distributed.forked_ranks import RankError, run_cases_on_ranks
from moesaic.parallel.config import ParallelConfig
from moesaic.train.run import Run
from moesaic.verify.enumerate_plans import (
    PlanSet,
    describe_plan,
    enumerate_plans,
    meta_model,
    plan_problems,
)
from moesaic.verify.record_run import ModelShapes, TrainingTrace, model_shapes, record_run
from moesaic.verify.synthetic_batches import SyntheticShape
from moesaic.verify.trace_differences import Tolerances, TraceDifferences, compare_traces

SINGLE_PROCESS_PLAN = ParallelConfig()
START_S = 0.8  # of the process groups of a plan, for each rank of a core


@dataclass(frozen=True, slots=True)
class PlanResult:
    """The result of one plan: its differences, or why it failed. Without problems it is equal."""

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
    """A small run and its model, synthetic batches, and the number of steps.

    A plan may take ``timeout_s``. ``collective_timeout_s`` is the timeout of collectives: a plan
    whose ranks call different collectives ends after it.
    """

    run: Run
    model: ModelShapes
    shape: SyntheticShape
    tolerances: Tolerances
    steps: int = 3
    timeout_s: float = 120.0
    collective_timeout_s: float = 20.0


def make_setup(run: Run, *, steps: int = 3, timeout_s: float = 120.0) -> VerifySetup:
    """Return the setup of a run, with batches for its kind of model."""
    return VerifySetup(
        run,
        model_shapes(run),
        SyntheticShape.of_model(run.model),
        Tolerances.for_run(run),
        steps=steps,
        timeout_s=timeout_s,
        collective_timeout_s=min(20.0, timeout_s),
    )


def plans_up_to(run: Run, *, world_size: int) -> PlanSet:
    """Return every plan for each divisor of ``world_size`` from 2 on."""
    divisors = [ranks for ranks in range(2, world_size + 1) if world_size % ranks == 0]
    return enumerate_plans(divisors, run=run)


def configured_plan(run: Run, *, world_size: int) -> PlanSet:
    """Return the plan of the run's own config for ``world_size`` ranks. Raises ConfigError."""
    parallel = run.parallel.replace(plan=run.parallel.plan.resolve(world_size))
    problems = plan_problems(parallel, model=meta_model(run), run=run)
    if problems:
        raise ConfigError(problems)
    return PlanSet((parallel,), {})


def run_reference(setup: VerifySetup) -> TrainingTrace:
    """Record the steps in a single process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on every rank
    try:
        return _record(setup, SINGLE_PROCESS_PLAN)
    finally:
        torch.set_num_threads(threads)


def compare_plans(
    setup: VerifySetup, *, plans: Sequence[ParallelConfig], reference: TrainingTrace
) -> Iterator[PlanResult]:
    """Yield the result of each plan, in the order of their numbers of ranks.

    ``reference`` is that of ``run_reference``. The plans of one number of ranks share a fork of
    this process, whose memory must hold no CUDA context.
    """

    def record_on_rank(parallel: ParallelConfig) -> TrainingTrace | None:
        trace = _record(setup, parallel)
        return None if distributed.get_rank() else trace

    for ranks in sorted({parallel.plan.world_size for parallel in plans}):
        same_size = [parallel for parallel in plans if parallel.plan.world_size == ranks]
        outcomes = run_cases_on_ranks(
            ranks,
            record_on_rank,
            same_size,
            timeout_s=setup.timeout_s,
            collective_timeout_s=setup.collective_timeout_s,
        )
        for parallel, outcome in zip(same_size, outcomes, strict=True):
            yield _plan_result(parallel, outcome, reference=reference, tolerances=setup.tolerances)


def time_of_plans(plans: Sequence[ParallelConfig], *, reference_s: float) -> float:
    """Return about how many seconds ``compare_plans`` takes, given those of the reference.

    Ranks share the cores of this machine, and each plan starts its groups anew.
    """
    cores = os.cpu_count() or 1
    ranks = [parallel.plan.world_size for parallel in plans]
    return sum(reference_s * max(1.0, n / cores) + START_S * n / cores for n in ranks)


def time_left(plans: Sequence[ParallelConfig], *, done: int, seconds: float) -> float:
    """Return about how many seconds the plans after the first ``done`` take."""
    ranks = sorted(parallel.plan.world_size for parallel in plans)  # the order of comparison
    return seconds * sum(ranks[done:]) / max(1, sum(ranks[:done]))


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
        # the rank and the last line of its traceback, or the only line
        first, *rest = [line for line in str(outcome).splitlines() if line.strip()]
        text = f"{first.rstrip(':')}: {rest[-1].strip()}" if rest else first
        return PlanResult(ranks, plan, parallel, None, (f"failed: {text}",))
    differences = compare_traces(reference, other=outcome[0])
    problems = tuple(differences.exceeding(tolerances))
    return PlanResult(ranks, plan, parallel, differences, problems, min(outcome[0].seconds))


def count_dropped(trace: TrainingTrace) -> tuple[int, int]:
    """Return how many routed tokens of the recorded micro-batches were dropped, and all of them."""
    counts = [count for step in trace.expert_counts for count in step.values()]
    return sum(int(c[-1]) for c in counts), sum(int(c.sum()) for c in counts)


def unequal_plans(results: Iterable[PlanResult]) -> list[PlanResult]:
    """Return the results that are not equal."""
    return [result for result in results if not result.equal]


_MEASURES = ("loss", "metrics", "norm", "gradients", "weights", "expert counts")
TABLE_COLUMNS = ["ranks", "plan", *_MEASURES, "result"]


def to_markdown(results: Sequence[PlanResult]) -> str:
    """Return a Markdown table: a row for each plan, fewest ranks first."""
    return markdown_table(TABLE_COLUMNS, map(_table_row, results)).rstrip("\n")


def summarize(results: Sequence[PlanResult]) -> str:
    """Return the number of plans and of ranks, and how many plans were equal."""
    ranks = ", ".join(map(str, sorted({result.world_size for result in results})))
    unequal = len(unequal_plans(results))
    end = f"{unequal} not equal to one process" if unequal else "each equals one process"
    return f"{len(results)} plan{'s' * (len(results) != 1)} of {ranks} ranks: {end}"


def rejection_lines(rejected: Mapping[str, Sequence[ParallelConfig]]) -> Iterator[str]:
    """Yield a line for each reason for which plans were not run."""
    for reason, plans in sorted(rejected.items(), key=lambda item: -len(item[1])):
        yield f"{len(plans)} refused: {reason}"


def tolerances_text(tolerances: Tolerances) -> str:
    """Return the tolerances in a sentence."""
    return (
        f"Equal means: loss and norm within {tolerances.loss:.0e} of the value, gradients within "
        f"{tolerances.gradient:.0e} of the tensor's greatest value, weights within "
        f"{tolerances.weight:.0e} of the step's change, the same number of tokens for every expert "
        "and dropped, and replicas of a value with the same bits."
    )


def _table_row(result: PlanResult) -> list[str]:
    found, measures = result.differences, ["-"] * len(_MEASURES)
    if found is not None:
        floats = (found.loss, found.metrics, found.norm, found.gradient, found.weight)
        count = found.expert_counts.value
        measures = [f"{difference.value:.0e}" for difference in floats]
        measures.append(f"{count:.0f} differ" if count else "same")
    outcome = "equal" if result.equal else f"**{'; '.join(result.problems)}**"
    return [str(result.world_size), result.plan, *measures, outcome]
