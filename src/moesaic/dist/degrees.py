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

from moesaic.dist.fit import Cost

CANDIDATES = (1, 2, 4, 8)  # those of Tutel


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage costs and how much of it there is for all rows."""

    cost: Cost
    size: float

    def seconds(self, degree: int) -> float:
        """Return the time of one of ``degree`` equal chunks; a stage of no size takes none."""
        return self.cost.seconds(self.size / degree) if self.size else 0.0


NOTHING = Stage(Cost(0.0, 0.0), 0.0)


@dataclass(frozen=True, slots=True)
class Layer:
    """The stages of a pass over one layer. ``exchange`` happens twice: out and home.

    ``gradients`` are seconds of other traffic between nodes that may fill the gaps.
    """

    exchange: Stage
    experts: Stage
    gather: Stage = NOTHING
    scatter: Stage = NOTHING
    gradients: float = 0.0

    def backward(self, *, gradients: float = 0.0) -> "Layer":
        """Return the backward pass: two products for each one, and the gradients to be summed."""
        twice = replace(self.experts, cost=self.experts.cost.times(2))
        return Layer(self.exchange, twice, self.scatter, self.gather, gradients)


def modelled(layer: Layer, degree: int) -> float:
    """Return the seconds of a pass in ``degree`` chunks: the largest of its lower bounds."""
    exchange, experts = layer.exchange.seconds(degree), layer.experts.seconds(degree)
    gather, scatter = layer.gather.seconds(degree), layer.scatter.seconds(degree)
    others = degree - 1  # chunks beside the one that goes all the way
    way = 2 * exchange + gather + experts + scatter
    return max(
        2 * degree * exchange + layer.gradients,  # the links between nodes never rest
        2 * exchange + degree * (gather + scatter),  # those inside never do
        way + others * max(exchange, gather, experts, scatter),  # nor does one stage
    )


def fastest(
    layer: Layer,
    *,
    seconds: Callable[[Layer, int], float] = modelled,
    candidates: Sequence[int] = CANDIDATES,
) -> int:
    """Return the number of chunks with the least seconds, the fewest among equals."""
    return min(candidates, key=lambda degree: (seconds(layer, degree), degree))


class _Job(NamedTuple):
    start: float
    stage: int
    chunk: int


def simulated(layer: Layer, degree: int) -> float:
    """Return the seconds of a pass when every link takes the first chunk that is ready.

    Of two that are ready the one at the earlier stage goes first, as in a queue.
    """
    links = ("between", "inside", "processor", "inside", "between")
    stages = (layer.exchange, layer.gather, layer.experts, layer.scatter, layer.exchange)
    lengths = [stage.seconds(degree) for stage in stages]
    free = dict.fromkeys(links, 0.0)
    ready = {(0, chunk): 0.0 for chunk in range(degree)}
    end = 0.0
    while ready:
        job = min(_Job(max(free[links[s]], at), s, chunk) for (s, chunk), at in ready.items())
        del ready[job.stage, job.chunk]
        free[links[job.stage]] = done = job.start + lengths[job.stage]
        end = max(end, done)
        if job.stage + 1 < len(stages):
            ready[job.stage + 1, job.chunk] = done
    return max(end, 2 * degree * lengths[0] + layer.gradients)
