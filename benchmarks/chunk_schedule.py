"""The number of chunks of an overlapped all-to-all, from an alpha-beta cost model of its stages.

A chunk of an MoE layer's rows passes five stages: all-to-all to the nodes of its experts,
all-gather over the ranks that hold slices of an expert, the experts, reduce-scatter over the
slices, all-to-all back. Links between nodes, links inside a node and the processor work at the same
time, each on one chunk. More chunks overlap more and start more often. After Pan et al. 2025,
FSMoE, arXiv:2501.10714: one formula for each resource that may be the bottleneck. The paper has
conditions that select the formula and solves it for the number of chunks; here the largest of the
lower bounds counts, and the candidates are tried. ``simulated_seconds`` simulates the schedule as a
check.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moesaic.core.errors import UserError
from moesaic.moe.adaptive_dispatcher import LinearCost

CHUNK_CANDIDATES = (1, 2, 4, 8)  # those of Tutel


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
            f"{len(seconds)} times of {len(set(sizes))} different sizes do not determine a start "
            "cost and a cost per byte: measure each of two sizes or more"
        )
    count, mean_size, mean_seconds = len(sizes), sum(sizes) / len(sizes), sum(seconds) / len(sizes)
    size_variance = sum((n - mean_size) ** 2 for n in sizes)
    covariance = sum(
        (n - mean_size) * (t - mean_seconds) for n, t in zip(sizes, seconds, strict=True)
    )
    beta = covariance / size_variance
    alpha = mean_seconds - beta * mean_size
    if beta < 0:
        alpha, beta = mean_seconds, 0.0
    elif alpha < 0:
        dot = sum(n * t for n, t in zip(sizes, seconds, strict=True))
        alpha, beta = 0.0, dot / sum(n * n for n in sizes)
    cost = LinearCost(alpha, beta)
    residual = sum((t - cost.seconds(n)) ** 2 for n, t in zip(sizes, seconds, strict=True)) / count
    variance = sum((t - mean_seconds) ** 2 for t in seconds) / count
    return CostFit(cost, 1 - residual / variance if variance else 1.0)


@dataclass(frozen=True, slots=True)
class StageCost:
    """The cost of one stage, and its size for all rows together."""

    cost: LinearCost
    size: float

    def seconds(self, num_chunks: int) -> float:
        """Return the time of one of ``num_chunks`` equal chunks; a stage of no size takes none."""
        return self.cost.seconds(self.size / num_chunks) if self.size else 0.0


NO_COST = StageCost(LinearCost(0.0, 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The stages of one pass over a layer. ``all_to_all`` occurs twice: dispatch and combine.

    ``gradient_s`` is seconds of other traffic between nodes that may fill the gaps.
    """

    all_to_all: StageCost
    experts: StageCost
    all_gather: StageCost = NO_COST
    reduce_scatter: StageCost = NO_COST
    gradient_s: float = 0.0

    def backward(self, *, gradient_s: float = 0.0) -> "LayerCost":
        """Return the backward pass: two products for each one, and the gradients to be summed."""
        one = self.experts.cost
        experts = replace(self.experts, cost=LinearCost(2 * one.alpha, 2 * one.beta))
        return LayerCost(self.all_to_all, experts, self.reduce_scatter, self.all_gather, gradient_s)


def modelled_seconds(layer: LayerCost, num_chunks: int) -> float:
    """Return the seconds of a pass in ``num_chunks`` chunks: the largest of its lower bounds."""
    exchange, experts = layer.all_to_all.seconds(num_chunks), layer.experts.seconds(num_chunks)
    gather, scatter = layer.all_gather.seconds(num_chunks), layer.reduce_scatter.seconds(num_chunks)
    one_chunk = 2 * exchange + gather + experts + scatter
    return max(
        2 * num_chunks * exchange + layer.gradient_s,  # links between nodes are always busy
        2 * exchange + num_chunks * (gather + scatter),  # links inside a node are always busy
        one_chunk + (num_chunks - 1) * max(exchange, gather, experts, scatter),  # one stage is
    )


def best_num_chunks(
    layer: LayerCost,
    *,
    seconds: Callable[[LayerCost, int], float] = modelled_seconds,
    candidates: Sequence[int] = CHUNK_CANDIDATES,
) -> int:
    """Return the number of chunks with the least seconds, the fewest among equals."""
    return min(candidates, key=lambda num_chunks: (seconds(layer, num_chunks), num_chunks))


class _ScheduledChunk(NamedTuple):
    start: float
    stage: int
    chunk: int


def simulated_seconds(layer: LayerCost, num_chunks: int) -> float:
    """Return the seconds of a pass when every resource takes the first chunk that is ready.

    Of two that are ready the one at the earlier stage goes first, as in a queue.
    """
    resources = ("between", "inside", "processor", "inside", "between")
    stages = (
        layer.all_to_all,
        layer.all_gather,
        layer.experts,
        layer.reduce_scatter,
        layer.all_to_all,
    )
    durations = [stage.seconds(num_chunks) for stage in stages]
    free_at = dict.fromkeys(resources, 0.0)
    ready = {(0, chunk): 0.0 for chunk in range(num_chunks)}
    end = 0.0
    while ready:
        job = min(
            _ScheduledChunk(max(free_at[resources[s]], at), s, chunk)
            for (s, chunk), at in ready.items()
        )
        del ready[job.stage, job.chunk]
        free_at[resources[job.stage]] = done = job.start + durations[job.stage]
        end = max(end, done)
        if job.stage + 1 < len(stages):
            ready[job.stage + 1, job.chunk] = done
    return max(end, 2 * num_chunks * durations[0] + layer.gradient_s)
