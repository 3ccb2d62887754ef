"""Degrees: in how many chunks an MoE layer's rows should travel, from what each stage costs.

A chunk goes through five stages: out to its experts' node, gathered over the ranks that hold slices
of an expert, multiplied, summed back over the slices, home. The links between nodes, those inside
one and the processor work at the same time, each on one chunk. More chunks overlap more and start
more often. After Pan et al. 2025, FSMoE, arXiv:2501.10714: one formula for each link that
everything may wait for. The paper has conditions that say which one holds and solves for the number
of chunks; we take the largest of lower bounds and try the numbers. ``simulated`` plays the
schedule: its twin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moesaic.dist.fit import LinearCost

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
    stages = (layer.all_to_all, layer.all_gather, layer.experts, layer.reduce_scatter, layer.all_to_all)
    lengths = [stage.seconds(num_chunks) for stage in stages]
    free = dict.fromkeys(links, 0.0)
    ready = {(0, chunk): 0.0 for chunk in range(num_chunks)}
    end = 0.0
    while ready:
        job = min(_ScheduledChunk(max(free[links[s]], at), s, chunk) for (s, chunk), at in ready.items())
        del ready[job.stage, job.chunk]
        free[links[job.stage]] = done = job.start + lengths[job.stage]
        end = max(end, done)
        if job.stage + 1 < len(stages):
            ready[job.stage + 1, job.chunk] = done
    return max(end, 2 * num_chunks * lengths[0] + layer.gradient_s)
