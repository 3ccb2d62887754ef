"""Prove: make the same steps under many plans, and say which of them equal one process."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed

from moesaic.core.errors import ConfigError
from moesaic.dist.forked import RankError, run_each
from moesaic.parallel.apply import check
from moesaic.parallel.config import Parallel
from moesaic.train.checks import the_pipeline_has_work
from moesaic.train.run import Run
from moesaic.verify.compare import Differences, Tolerances, differences
from moesaic.verify.follow import Model, Trace, follow, model_of
from moesaic.verify.plans import Plans, every, named
from moesaic.verify.stream import Shape

ALONE = Parallel()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one plan: its differences, or why it did not end; nothing wrong is equal."""

    ranks: int
    plan: str
    parallel: Parallel
    found: Differences | None
    wrong: tuple[str, ...]
    step_s: float = 0.0

    @property
    def equal(self) -> bool:
        return not self.wrong


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run: a small run and its model, made-up batches, and how many steps.

    A plan may take ``timeout_s``. ``patience_s`` is how long a collective waits: a plan whose ranks
    disagree about what comes next ends after it.
    """

    run: Run
    model: Model
    shape: Shape
    allowed: Tolerances
    steps: int = 3
    timeout_s: float = 120.0
    patience_s: float = 20.0


def setting(run: Run, *, steps: int = 3, timeout_s: float = 120.0) -> Setting:
    """Return the setting of a run, its batches of the model's kind."""
    return Setting(
        run,
        model_of(run),
        Shape(source=run.model.encoder.layers > 0),
        Tolerances.of(run),
        steps=steps,
        timeout_s=timeout_s,
        patience_s=min(20.0, timeout_s),
    )


def plans(run: Run, *, world: int) -> Plans:
    """Return every plan for 2 ranks and for each number up to ``world`` that divides it."""
    worlds = [ranks for ranks in range(2, world + 1) if world % ranks == 0]
    return every(worlds, run=run)


def own(run: Run, *, world: int) -> Plans:
    """Return the run's own plan for so many ranks."""
    with torch.device("meta"):
        model = run.model.build()
    parallel = run.parallel.replace(plan=run.parallel.plan.on(world))
    check(model, parallel=parallel, plan=parallel.plan)
    problems = list(the_pipeline_has_work(run.replace(parallel=parallel)))
    if problems:
        raise ConfigError(problems)
    return Plans((parallel,), {})


def reference(given: Setting) -> Trace:
    """Make the steps in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every rank does
    try:
        return _follow(given, ALONE)
    finally:
        torch.set_num_threads(threads)


def prove(given: Setting, *, chosen: Sequence[Parallel]) -> Iterator[Verdict]:
    """Yield a verdict on each plan, in the order of their numbers of ranks.

    The plans of one number of ranks share a fork of this process, whose memory must hold no CUDA
    context. A plan that raises, dies or hangs is a verdict too.
    """
    truth = reference(given)
    for ranks in sorted({parallel.plan.world for parallel in chosen}):
        several = [parallel for parallel in chosen if parallel.plan.world == ranks]

        def one(parallel: Parallel) -> Trace | None:
            trace = _follow(given, parallel)
            return None if distributed.get_rank() else trace

        outcomes = run_each(
            ranks, one, several, timeout_s=given.timeout_s, patience_s=given.patience_s
        )
        for parallel, outcome in zip(several, outcomes, strict=True):
            yield _judged(parallel, outcome, truth=truth, allowed=given.allowed)


def _follow(given: Setting, parallel: Parallel) -> Trace:
    model, shape = given.model, given.shape
    return follow(given.run, parallel=parallel, shape=shape, steps=given.steps, model=model)


def _judged(
    parallel: Parallel, outcome: list[Any] | RankError, *, truth: Trace, allowed: Tolerances
) -> Verdict:
    ranks, plan = parallel.plan.world, named(parallel)
    if isinstance(outcome, RankError):
        return Verdict(ranks, plan, parallel, None, (f"failed: {_last(str(outcome))}",))
    found = differences(truth, other=outcome[0])
    step_s = min(outcome[0].seconds)
    return Verdict(ranks, plan, parallel, found, tuple(found.wrong(allowed)), step_s)


def _last(text: str) -> str:
    """Return which rank it was and the last line of its traceback, or the whole of a sentence."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1].strip()}"


def machine() -> str:
    """Return what the proof was run on, in a few words."""
    return f"{os.cpu_count()} CPU cores, torch {torch.__version__}, gloo"


def dropped(trace: Trace) -> tuple[int, int]:
    """Return how many edges of the traced micro-batches were dropped, and how many there were."""
    counts = [count for step in trace.edges for count in step.values()]
    return sum(int(c[-1]) for c in counts), sum(int(c.sum()) for c in counts)


def failed(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return those that are not equal."""
    return [verdict for verdict in verdicts if not verdict.equal]
