"""Fit: the straight line through measured times, ``seconds = alpha + beta * size``.

What starts (alpha) and what each byte, row or multiplication costs (beta) is all that the choice of
a schedule needs (Pan et al. 2025, FSMoE, arXiv:2501.10714).

Degrees: in how many chunks an MoE layer's rows should travel, from what each stage costs.

A chunk goes through five stages: out to its experts' node, gathered over the ranks that hold slices
of an expert, multiplied, summed back over the slices, home. The links between nodes, those inside
one and the processor work at the same time, each on one chunk. More chunks overlap more and start
more often. After Pan et al. 2025, FSMoE, arXiv:2501.10714: one formula for each link that
everything may wait for. The paper has conditions that say which one holds and solves for the number
of chunks; we take the largest of lower bounds and try the numbers. ``simulated_seconds`` plays the
schedule: its twin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moesaic.core.errors import UserError


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds of one call: ``alpha`` to start it and ``beta`` for each unit of its size."""

    alpha: float
    beta: float

    def seconds(self, size: float) -> float:
        return self.alpha + self.beta * size

    def scaled(self, factor: float) -> "LinearCost":
        """Return the cost of doing it so many times as much."""
        return LinearCost(self.alpha * factor, self.beta * factor)


@dataclass(frozen=True, slots=True)
class CostFit:
    """A cost, and the share of the variance of the measured times that it explains."""

    cost: LinearCost
    r_squared: float


def fit_cost(sizes: Sequence[float], seconds: Sequence[float]) -> CostFit:
    """Return the least-squares line. Neither number can be negative: if one is, it is zero.

    Raises UserError when there are fewer than two different sizes.
    """
    if len(set(sizes)) < 2 or len(sizes) != len(seconds):
        raise UserError(
            f"{len(seconds)} times of {len(set(sizes))} different sizes do not say what a start "
            "and what a byte costs: measure each of two sizes or more"
        )
    count, mean, level = len(sizes), sum(sizes) / len(sizes), sum(seconds) / len(seconds)
    spread = sum((n - mean) ** 2 for n in sizes)
    beta = sum((n - mean) * (t - level) for n, t in zip(sizes, seconds, strict=True)) / spread
    alpha = level - beta * mean
    if beta < 0:
        alpha, beta = level, 0.0
    elif alpha < 0:
        dot = sum(n * t for n, t in zip(sizes, seconds, strict=True))
        alpha, beta = 0.0, dot / sum(n * n for n in sizes)
    cost = LinearCost(alpha, beta)
    left = sum((t - cost.seconds(n)) ** 2 for n, t in zip(sizes, seconds, strict=True)) / count
    varied = sum((t - level) ** 2 for t in seconds) / count
    return CostFit(cost, 1 - left / varied if varied else 1.0)


CHUNK_CANDIDATES = (1, 2, 4, 8)  # those of Tutel


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage costs and how much of it there is for all rows."""

    cost: LinearCost
    size: float

    def seconds(self, num_chunks: int) -> float:
        """Return the time of one of ``degree`` equal chunks; a stage of no size takes none."""
        return self.cost.seconds(self.size / num_chunks) if self.size else 0.0


NO_COST = StageCost(LinearCost(0.0, 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The stages of a pass over one layer. ``exchange`` happens twice: out and home.

    ``gradients`` are seconds of other traffic between nodes that may fill the gaps.
    """

    all_to_all: StageCost
    experts: StageCost
    all_gather: StageCost = NO_COST
    reduce_scatter: StageCost = NO_COST
    gradient_s: float = 0.0

    def backward(self, *, gradient_s: float = 0.0) -> "LayerCost":
        """Return the backward pass: two products for each one, and the gradients to be summed."""
        twice = replace(self.experts, cost=self.experts.cost.scaled(2))
        return LayerCost(self.all_to_all, twice, self.reduce_scatter, self.all_gather, gradient_s)


def modelled_seconds(layer: LayerCost, num_chunks: int) -> float:
    """Return the seconds of a pass in ``degree`` chunks: the largest of its lower bounds."""
    exchange, experts = layer.all_to_all.seconds(num_chunks), layer.experts.seconds(num_chunks)
    gather, scatter = layer.all_gather.seconds(num_chunks), layer.reduce_scatter.seconds(num_chunks)
    others = num_chunks - 1  # chunks beside the one that goes all the way
    way = 2 * exchange + gather + experts + scatter
    return max(
        2 * num_chunks * exchange + layer.gradient_s,  # the links between nodes never rest
        2 * exchange + num_chunks * (gather + scatter),  # those inside never do
        way + others * max(exchange, gather, experts, scatter),  # nor does one stage
    )


def best_num_chunks(
    layer: LayerCost,
    *,
    seconds: Callable[[LayerCost, int], float] = modelled_seconds,
    candidates: Sequence[int] = CHUNK_CANDIDATES,
) -> int:
    """Return the number of chunks with the least seconds, the fewest among equals."""
    return min(candidates, key=lambda degree: (seconds(layer, degree), degree))


class _ScheduledChunk(NamedTuple):
    start: float
    stage: int
    chunk: int


def simulated_seconds(layer: LayerCost, num_chunks: int) -> float:
    """Return the seconds of a pass when every link takes the first chunk that is ready.

    Of two that are ready the one at the earlier stage goes first, as in a queue.
    """
    links = ("between", "inside", "processor", "inside", "between")
    stages = (
        layer.all_to_all,
        layer.all_gather,
        layer.experts,
        layer.reduce_scatter,
        layer.all_to_all,
    )
    lengths = [stage.seconds(num_chunks) for stage in stages]
    free = dict.fromkeys(links, 0.0)
    ready = {(0, chunk): 0.0 for chunk in range(num_chunks)}
    end = 0.0
    while ready:
        job = min(
            _ScheduledChunk(max(free[links[s]], at), s, chunk) for (s, chunk), at in ready.items()
        )
        del ready[job.stage, job.chunk]
        free[links[job.stage]] = done = job.start + lengths[job.stage]
        end = max(end, done)
        if job.stage + 1 < len(stages):
            ready[job.stage + 1, job.chunk] = done
    return max(end, 2 * num_chunks * lengths[0] + layer.gradient_s)
