"""Enumerate parallel plans: all plans of a number of ranks, and a pairwise cover of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import combinations, product

import torch

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import DENSE_AXES, ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.train.run import Run
from moesaic.train.run_checks import pipeline_has_enough_micro_batches

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class PlanSet:
    """``valid`` plans, and the ``rejected`` ones by the reason that rejects them."""

    valid: tuple[ParallelConfig, ...]
    rejected: dict[str, tuple[ParallelConfig, ...]]

    def pairwise_cover(self) -> "PlanSet":
        """Return few plans that contain every pair of options that any valid plan contains."""
        return PlanSet(tuple(_pairwise_cover(self.valid)), self.rejected)


def enumerate_plans(world_sizes: Iterable[int], *, run: Run) -> PlanSet:
    """Return all plans of each number of ranks.

    An option beside the degrees (how attention crosses ranks, ...) takes each member of its family
    where the plan uses it, and is as in ``run.parallel`` elsewhere.
    """
    model, base = meta_model(run), run.parallel
    valid: list[ParallelConfig] = []
    rejected: dict[str, list[ParallelConfig]] = {}
    for world_size in world_sizes:
        known: dict[ParallelConfig, list[str]] = {}
        for parallel in _parallel_configs(world_size, base=base):
            # every plan supports activation checkpointing: check each plan once without it
            key = parallel.replace(activation_checkpointing=base.activation_checkpointing)
            if key not in known:
                known[key] = plan_problems(key, model=model, run=run)
            problems = known[key]
            (rejected.setdefault(problems[0], []) if problems else valid).append(parallel)
    return PlanSet(tuple(valid), {reason: tuple(plans) for reason, plans in rejected.items()})


def meta_model(run: Run) -> Transformer:
    """Return a run's model without memory for its parameters."""
    with torch.device("meta"):
        return Transformer(run.model)


def plan_problems(parallel: ParallelConfig, *, model: Transformer, run: Run) -> list[str]:
    """Return the reasons why a model and its run cannot be trained under a plan."""
    try:
        plan = parallel.plan.resolve(parallel.plan.world_size)
        check_parallel(model, parallel=parallel, plan=plan)
        return [
            *run.trainable.parallel_problems(parallel.plan, memory=parallel.memory),
            *pipeline_has_enough_micro_batches(run.model_copy(update={"parallel": parallel})),
        ]
    except ConfigError as error:
        return list(error.problems)


def describe_plan(parallel: ParallelConfig) -> str:
    """Return the options that differ from a single process, in a few words."""
    defaults = {n: type(field.default).__name__ for n, field in ParallelConfig.model_fields.items()}
    options = (
        f"{n} {value}" for n, value in _options(parallel).items() if defaults.get(n) != value
    )
    return ", ".join(options) or "single process"


def _parallel_configs(world_size: int, *, base: ParallelConfig) -> Iterator[ParallelConfig]:
    for plan in parallel_plans(world_size):
        options = dict(option_families(plan))
        for chosen in product(*options.values()):
            yield base.replace(plan=plan, **dict(zip(options, chosen, strict=True)))


def parallel_plans(world_size: int) -> Iterator[ParallelPlan]:
    """Yield every plan of a number of ranks, valid for a model or not."""
    for degrees in _factorizations(world_size, len(DENSE_AXES)):
        dense = ParallelPlan(**dict(zip(DENSE_AXES, degrees, strict=True)))
        replicas = (dense.data or 1) * dense.context
        for _, expert, expert_tensor in _factorizations(dense.stage_size, 3):
            plan = dense.replace(expert=expert, expert_tensor=expert_tensor)
            has_replicas = replicas > 1 or plan.stage_size > expert * expert_tensor
            for zero in ZERO_STAGES if has_replicas else ZERO_STAGES[:1]:
                yield plan.replace(zero=zero)


def _factorizations(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    """Yield every ordered way to write a number as a product of ``factors`` factors."""
    if factors == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in _factorizations(number // first, factors - 1))


# Whether a plan uses an option of ``ParallelConfig``. ``capacity_scope`` is not here: with any
# scope but the global batch the loss is another one.
APPLIES_TO: dict[str, Callable[[ParallelPlan], bool]] = {
    "context_parallel": lambda plan: plan.context > 1,
    "dispatch": lambda plan: plan.expert > 1,
    "pipeline_schedule": lambda plan: plan.pipe > 1,
    "activation_checkpointing": lambda plan: plan.world_size > 1,
}


def option_families(plan: ParallelPlan) -> Iterator[tuple[str, list[Choice]]]:
    """Yield the options that a plan uses, each with all members of its family.

    A member has its default values; required numbers are 2.
    """
    for name, field in ParallelConfig.model_fields.items():
        family = field.annotation
        if isinstance(family, type) and issubclass(family, Choice) and name in APPLIES_TO:
            members = [_default_member(member) for member in family.members.values()]
            if len(members) > 1 and APPLIES_TO[name](plan):
                yield name, members


def _default_member(member: type[Choice]) -> Choice:
    return member(**{n: 2 for n, field in member.model_fields.items() if field.is_required()})


def _options(parallel: ParallelConfig) -> dict[str, object]:
    """Return the degrees above 1, the ZeRO stage and the names of the members in use."""
    plan = parallel.plan
    degrees = {name: getattr(plan, name) or 1 for name in (*DENSE_AXES, "expert", "expert_tensor")}
    options: dict[str, object] = {name: n for name, n in degrees.items() if n > 1}
    if plan.zero:
        options["zero"] = plan.zero
    return options | {f: type(getattr(parallel, f)).__name__ for f, _ in option_families(plan)}


def _pairwise_cover(plans: Sequence[ParallelConfig]) -> Iterator[ParallelConfig]:
    """Yield the plan with most uncovered pairs of options, until every pair is covered."""
    numbers: dict[object, int] = {}
    pairs = [_pairs(plan, numbers=numbers) for plan in plans]
    # the uncovered pairs of a plan only decrease, so most plans need no second evaluation
    queue = [(-bits.bit_count(), index) for index, bits in enumerate(pairs)]
    heapify(queue)
    covered = 0
    while queue:
        _, index = heappop(queue)
        uncovered = (pairs[index] & ~covered).bit_count()
        if queue and uncovered < -queue[0][0]:
            heappush(queue, (-uncovered, index))
        elif uncovered:
            covered |= pairs[index]
            yield plans[index]


def _pairs(parallel: ParallelConfig, *, numbers: dict[object, int]) -> int:
    """Return a bit for each pair of options; ``numbers`` maps a pair to its bit, and grows."""
    options = _options(parallel) | {"zero": parallel.plan.zero, "ranks": parallel.plan.world_size}
    pairs = combinations(sorted(options.items()), 2)
    return sum(1 << numbers.setdefault(pair, len(numbers)) for pair in pairs)
