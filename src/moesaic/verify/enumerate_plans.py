"""Plans: every way in which a number of ranks can share a model, and a few that cover them all."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import combinations, product

import torch

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.train.run import Run
from moesaic.train.run_checks import pipeline_has_enough_micro_batches

PLAN_AXES = ("pipe", "data", "context", "tensor")
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class PlanSet:
    """``fit`` can be run; ``refused`` are the others, by the reason they are refused for."""

    valid: tuple[ParallelConfig, ...]
    rejected: dict[str, tuple[ParallelConfig, ...]]

    def pairwise_cover(self) -> "PlanSet":
        """Return the fewest found in which any two choices that can meet do meet."""
        return PlanSet(tuple(_pairwise_cover(self.valid)), self.rejected)


def enumerate_plans(worlds: Iterable[int], *, run: Run) -> PlanSet:
    """Return all plans of so many ranks each.

    What a plan does not say (how attention crosses ranks, ...) takes each member of its family
    where it is of consequence, and is as in ``run.parallel`` elsewhere.
    """
    with torch.device("meta"):
        model = Transformer(run.model)
    base = run.parallel
    fit: list[ParallelConfig] = []
    refused: dict[str, list[ParallelConfig]] = {}
    for world in worlds:
        known: dict[ParallelConfig, str | None] = {}
        for parallel in _parallel_configs(world, base=base):
            alike = parallel.replace(
                activation_checkpointing=base.activation_checkpointing
            )  # which any plan can do
            if alike not in known:
                known[alike] = _rejection_reason(alike, model=model, run=run)
            why = known[alike]
            (fit if why is None else refused.setdefault(why, [])).append(parallel)
    return PlanSet(tuple(fit), {why: tuple(plans) for why, plans in refused.items()})


def sample_plan(world_size: int, *, run: Run, draw: random.Random) -> ParallelConfig | None:
    """Return a plan of ``every`` at random; None if there is none."""
    with torch.device("meta"):
        model = Transformer(run.model)
    plans = list(_plans(world_size))
    draw.shuffle(plans)
    for plan in plans:
        options = {field: draw.choice(members) for field, members in _option_families(plan)}
        parallel = run.parallel.replace(plan=plan, **options)
        if _rejection_reason(parallel, model=model, run=run) is None:
            return parallel
    return None


def _rejection_reason(parallel: ParallelConfig, *, model: Transformer, run: Run) -> str | None:
    try:
        check_parallel(
            model, parallel=parallel, plan=parallel.plan.resolve(parallel.plan.world_size)
        )
        return next(
            pipeline_has_enough_micro_batches(run.model_copy(update={"parallel": parallel})), None
        )
    except ConfigError as error:
        return error.problems[0]


def describe_plan(parallel: ParallelConfig) -> str:
    """Return what is not as in one process, in a few words."""
    usual = {n: _short_name(n, field.default) for n, field in ParallelConfig.model_fields.items()}
    said = (f"{n} {value}" for n, value in _choices(parallel).items() if usual.get(n) != value)
    return ", ".join(said) or "alone"


def _parallel_configs(world: int, *, base: ParallelConfig) -> Iterator[ParallelConfig]:
    for plan in _plans(world):
        options = dict(_option_families(plan))
        for chosen in product(*options.values()):
            yield base.replace(plan=plan, **dict(zip(options, chosen, strict=True)))


def _plans(world: int) -> Iterator[ParallelPlan]:
    for degrees in _factorizations(world, len(PLAN_AXES)):
        dense = ParallelPlan(**dict(zip(PLAN_AXES, degrees, strict=True)))
        copies = (dense.data or 1) * dense.context
        for _, expert, slices in _factorizations(dense.stage_size, 3):
            plan = dense.replace(expert=expert, expert_tensor=slices)
            shares = copies > 1 or plan.stage_size > expert * slices
            for zero in ZERO_STAGES if shares else ZERO_STAGES[:1]:
                yield plan.replace(zero=zero)


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every ordered way to write a number as a product of so many."""
    if parts == 1:
        yield (number,)
        return
    for first in (n for n in range(1, number + 1) if number % n == 0):
        yield from ((first, *rest) for rest in _factorizations(number // first, parts - 1))


# Whether a field of ``ParallelConfig`` is of consequence under a plan. ``capacity_scope`` is not here: where it is
# not the whole batch, another loss is asked for.
APPLIES_TO: dict[str, Callable[[ParallelPlan], bool]] = {
    "context_parallel": lambda plan: plan.context > 1,
    "dispatch": lambda plan: plan.expert > 1,
    "pipeline_schedule": lambda plan: plan.pipe > 1,
    "activation_checkpointing": lambda plan: plan.world_size > 1,
}


def _option_families(plan: ParallelPlan) -> Iterator[tuple[str, list[Choice]]]:
    """Yield the choices that are of consequence under a plan, each with its members.

    A member is as it is by default; numbers that must be given are 2.
    """
    for name, field in ParallelConfig.model_fields.items():
        family = field.annotation
        if isinstance(family, type) and issubclass(family, Choice) and name in APPLIES_TO:
            members = [_default_member(member) for member in family.members.values()]
            if len(members) > 1 and APPLIES_TO[name](plan):
                yield name, members


def _default_member(member: type[Choice]) -> Choice:
    return member(**{n: 2 for n, field in member.model_fields.items() if field.is_required()})


def _choices(parallel: ParallelConfig) -> dict[str, object]:
    plan = parallel.plan
    degrees = {name: getattr(plan, name) or 1 for name in (*PLAN_AXES, "expert", "expert_tensor")}
    found: dict[str, object] = {name: n for name, n in degrees.items() if n > 1}
    if plan.zero:
        found["zero"] = plan.zero
    for field, _ in _option_families(plan):
        found[field] = _short_name(field, getattr(parallel, field))
    return found


def _short_name(field: str, member: object) -> str:
    return type(member).__name__


def _pairwise_cover(fit: Sequence[ParallelConfig]) -> Iterator[ParallelConfig]:
    """Take the plan with most pairs that no plan before it had, until every pair was had."""
    numbers: dict[object, int] = {}
    pairs = [_pairs(plan, numbers=numbers) for plan in fit]
    # what a plan adds only shrinks as others are taken, so most need no second look
    left = [(-own.bit_count(), index) for index, own in enumerate(pairs)]
    heapify(left)
    had = 0
    while left:
        _, index = heappop(left)
        adds = (pairs[index] & ~had).bit_count()
        if left and adds < -left[0][0]:
            heappush(left, (-adds, index))
        elif adds:
            had |= pairs[index]
            yield fit[index]


def _pairs(parallel: ParallelConfig, *, numbers: dict[object, int]) -> int:
    """Return a bit for each pair of choices; ``numbers`` says which, and learns new ones."""
    choices = _choices(parallel) | {"zero": parallel.plan.zero, "ranks": parallel.plan.world_size}
    pairs = combinations(sorted(choices.items()), 2)
    return sum(1 << numbers.setdefault(pair, len(numbers)) for pair in pairs)
