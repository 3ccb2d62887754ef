"""Parallel plan: the degrees of data, context, tensor, pipeline and expert parallelism.

Arithmetic over rank numbers that needs no process: a laptop can check a plan of 8,192 ranks. The
ranks of one pipeline stage are folded twice (MoE Parallel Folding, 2504.14960): dense layers use
them as data x context x tensor, MoE layers as expert_data x expert x expert_tensor, innermost last.
Tokens are sharded over data, context and tensor; along an axis a parameter is either sharded or
replicated.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError

Degree = Annotated[int, Field(ge=1)]
DENSE_AXES = ("pipe", "data", "context", "tensor")
EXPERT_AXES = ("pipe", "expert_data", "expert", "expert_tensor")


class ParallelPlan(Config):
    """Degrees of parallelism. The default is data parallelism over all ranks.

    ``data`` None takes the remaining ranks. ``expert`` shards a layer's experts over so many ranks
    of a stage, independently of the dense layers; a layer of fewer experts uses as many ranks as it
    has experts (2201.05596, section 4.2). ``expert_tensor`` shards the hidden width of each expert.
    ``zero`` is the ZeRO stage (1910.02054): replicas of a parameter shard its optimizer state (1),
    its gradients too (2), and itself (3).
    """

    pipe: Degree = 1
    data: Degree | None = None
    context: Degree = 1
    tensor: Degree = 1
    expert: Degree = 1
    expert_tensor: Degree = 1
    zero: Literal[0, 1, 2, 3] = 0

    def resolve(self, world_size: int) -> "ParallelPlan":
        """Return the plan with ``data`` filled in. Raises ConfigError where it does not fit."""
        others = self.pipe * self.context * self.tensor
        data = self.data or max(1, world_size // others)
        if data * others != world_size:
            wanted = f"pipe {self.pipe} x data {data} x context {self.context}"
            raise ConfigError(
                [
                    f"parallel: {wanted} x tensor {self.tensor} is {data * others} ranks, but "
                    f"there are {world_size}: start as many as that, or change a degree "
                    f"({_divisors_text(world_size)} divide {world_size})"
                ]
            )
        filled = self.replace(data=data)
        problems = list(filled.problems())
        if problems:
            raise ConfigError(problems)
        return filled

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each rule of folding and ZeRO that the degrees violate."""
        folded = self.expert * self.expert_tensor
        if self.stage_size % folded:
            yield (
                f"parallel: expert {self.expert} x expert_tensor {self.expert_tensor} = {folded} "
                f"must divide data x context x tensor = {self.stage_size}: experts are folded over "
                "the ranks of one pipeline stage"
            )

    @property
    def world_size(self) -> int:
        """The number of all ranks. ``data`` must be filled in."""
        return self.pipe * self.stage_size

    @property
    def stage_size(self) -> int:
        """The number of ranks of one pipeline stage."""
        return (self.data or 1) * self.context * self.tensor

    def data_shard(self, rank: int) -> tuple[int, int]:
        """Return which shard of a batch's rows a rank reads, and the number of shards."""
        return RankGrid(self.axes()).coordinates(rank)["data"], self.data or 1

    def acronym(self, *, zero: str = "Z") -> str:
        """Return the combination in the notation of 2109.10465: E, E+D, E+Z, E+D+M, ...

        E is expert, D data, M tensor parallelism, ``zero`` is the word for ZeRO; C (context) and P
        (pipeline) are not in that paper.
        """
        copies = self.stage_size // (self.expert * self.expert_tensor)
        dense_copies = (self.data or 1) * self.context
        state = zero if self.zero else "D"
        words = [
            "E" if self.expert > 1 else "",
            state if (copies > 1 or self.zero) and dense_copies > 1 else "",
            "M" if self.tensor * self.expert_tensor > 1 else "",
            "C" if self.context > 1 else "",
            "P" if self.pipe > 1 else "",
        ]
        return "+".join(word for word in words if word) or "one rank"

    def expert_ranks(self, num_experts: int, *, layer: str = "a layer") -> int:
        """Return the number of ranks that shard a layer's experts. Raises ConfigError."""
        if num_experts % self.expert == 0:
            return self.expert
        if self.expert % num_experts == 0:
            return num_experts
        raise ConfigError(
            [
                f"parallel.expert={self.expert} neither divides the {num_experts} experts of "
                f"{layer} nor is divided by them: choose one of {_divisors_text(num_experts)}"
            ]
        )

    def axes(self, *, num_experts: int | None = None) -> dict[str, int]:
        """Return the sizes of the axes of dense layers, or of layers of ``num_experts``.

        Outermost first. Both enumerate the same ranks in the same order.
        """
        if num_experts is None:
            sizes = (self.pipe, self.data or 1, self.context, self.tensor)
            return dict(zip(DENSE_AXES, sizes, strict=True))
        expert = self.expert_ranks(num_experts)
        replicas = self.stage_size // (expert * self.expert_tensor)
        return dict(
            zip(EXPERT_AXES, (self.pipe, replicas, expert, self.expert_tensor), strict=True)
        )


class RankGrid:
    """Rank numbers as a grid of named axes, the last axis fastest."""

    def __init__(self, axes: dict[str, int]) -> None:
        self.axes = axes

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return a rank's coordinate on every axis."""
        coordinates: dict[str, int] = {}
        for name, size in reversed(self.axes.items()):
            rank, coordinates[name] = divmod(rank, size)
        return coordinates

    def rank_at(self, coordinates: dict[str, int]) -> int:
        """Return the rank at these coordinates."""
        number = 0
        for name, size in self.axes.items():
            number = number * size + coordinates[name]
        return number

    def size(self, names: Sequence[str]) -> int:
        """Return the number of ranks of a group along these axes."""
        return math.prod(self.axes[name] for name in names)

    def group(self, rank: int, names: Sequence[str]) -> tuple[int, ...]:
        """Return the ranks of this rank's group along the axes ``names``, in rank order."""
        found = [self.coordinates(rank)]
        for name in self.axes:
            if name in names:
                found = [p | {name: i} for p in found for i in range(self.axes[name])]
        return tuple(self.rank_at(p) for p in found)

    def groups(self, names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return every group along these axes, the one of rank 0 first."""
        ranks, seen, found = range(math.prod(self.axes.values())), set[int](), []
        for rank in ranks:
            if rank not in seen:
                found.append(self.group(rank, names))
                seen.update(found[-1])
        return tuple(found)


def _divisors_text(number: int) -> str:
    found = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, found if len(found) <= 12 else [*found[:6], "...", *found[-3:]]))
