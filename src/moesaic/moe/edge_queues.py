"""Edge queues: which edges are among the first of their expert's queue, on one rank or over many.

Over ranks no edge is sent, only counts. A queue longer than its capacity is cut at a key, which is
found digit by digit, from the highest on, as in a radix select: the ranks add up how many edges
have each value of a digit, and the digit at which the queue is full is the same on all of them.

Letters: N edges, E experts, C columns of a key, Q queues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.distributed.world import World

CapacityOf = Callable[[Int[Tensor, "Q"]], Int[Tensor, "Q"]]  # of the edges in a scope
DIGIT_BITS = 8
_DIGITS = 2**DIGIT_BITS


@dataclass(frozen=True, slots=True)
class QueuedEdges:
    """Edges by expert, and the keys that order them: edges with smaller keys come first.

    ``key_bits`` are the bits of each column; columns of 64 bits are signed, others not negative.
    ``row`` is the row of the batch. The experts from ``num_limited`` on have no capacity limit, and
    edges of expert ``num_experts`` are dropped already.
    """

    expert: Int[Tensor, "N"]
    key: Int[Tensor, "N C"]
    key_bits: Sequence[int]
    row: Int[Tensor, "N"]
    num_experts: int
    num_limited: int


def keep_first(edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
    """Return which edges are within the capacity of their expert, of those of this rank."""
    position = queue_positions(torch.cat([edges.expert[:, None], edges.key], 1))
    total = torch.full_like(edges.expert, edges.expert.numel())
    return (position < capacity(total)) | (edges.expert >= edges.num_limited)


def keep_first_of_rows(edges: QueuedEdges, *, capacity: CapacityOf) -> Bool[Tensor, "N"]:
    """Return the same where each row of the batch has a capacity of its own."""
    queue = edges.row * (edges.num_experts + 1) + edges.expert
    position = queue_positions(torch.cat([queue[:, None], edges.key], 1))
    row = edges.row.contiguous()
    ordered = row.sort().values
    total = torch.searchsorted(ordered, row, right=True)
    total -= torch.searchsorted(ordered, row)
    return (position < capacity(total)) | (edges.expert >= edges.num_limited)


def keep_first_over_ranks(
    edges: QueuedEdges, *, capacity: CapacityOf, world: World
) -> Bool[Tensor, "N"]:
    """Return which edges of this rank are within capacity, of the edges of all ranks. Collective.

    Equal keys are ordered by rank and then as on the rank, as if all edges were gathered.
    """
    expert, number = edges.expert, edges.num_experts + 1
    ones = torch.ones_like(expert)
    length = world.all_reduce(expert.new_zeros(number).index_add_(0, expert, ones))
    room = torch.where(
        torch.arange(number, device=length.device) < edges.num_limited,
        capacity(length.sum().expand(number)),
        length,
    )
    undecided, kept = length > room, ~(length > room)[expert]
    candidate = ~kept
    for digit in _digits(edges):
        if not bool(undecided.any()):  # the host waits; without a full expert it is the only time
            return kept
        counts = expert.new_zeros(number * _DIGITS)
        counts.index_add_(0, expert * _DIGITS + digit, candidate.long())
        up_to = world.all_reduce(counts).view(number, _DIGITS).cumsum(1)
        full = (up_to <= room[:, None]).sum(1)  # the digit at which the queue is full
        before = torch.where(full > 0, up_to.gather(1, (full - 1).clamp(min=0)[:, None])[:, 0], 0)
        kept = kept | (candidate & (digit < full[expert]))
        room = room - before
        undecided = undecided & (room > 0)
        candidate = candidate & (digit == full[expert]) & undecided[expert]
    return kept | (candidate & (_tie_positions(edges, candidate, world=world) < room[expert]))


def _tie_positions(
    edges: QueuedEdges, candidate: Bool[Tensor, "N"], *, world: World
) -> Int[Tensor, "N"]:
    """Return the position of each candidate among those of its expert, in the order of ranks."""
    number = edges.num_experts + 1
    queue = torch.where(candidate, edges.expert, number)
    counts = queue.new_zeros(number + 1).index_add_(0, queue, torch.ones_like(queue))
    before = torch.stack(world.all_gather(counts))[: world.rank].sum(0)
    return before[queue] + queue_positions(queue[:, None])


def _digits(edges: QueuedEdges) -> "list[Int[Tensor, 'N']]":
    """Return the digits of the keys, the highest first."""
    digits = []
    for column, bits in zip(edges.key.unbind(1), edges.key_bits, strict=True):
        # of signed numbers the highest bit is flipped: their order is then that of their digits
        ordered = column ^ torch.iinfo(torch.int64).min if bits == 64 else column
        shifts = range(0, bits, DIGIT_BITS)
        digits += [(ordered >> shift) & (_DIGITS - 1) for shift in reversed(shifts)]
    return digits


def queue_positions(edges: Int[Tensor, "N C"]) -> Int[Tensor, "N"]:
    """Return each edge's position in its expert's queue; columns are the expert, then the key."""
    order = torch.arange(edges.shape[0], device=edges.device)
    for column in reversed(range(edges.shape[1])):
        order = order[edges[order, column].argsort(stable=True)]
    queue = edges[order, 0]
    position = torch.empty_like(order)
    first = torch.searchsorted(queue, queue)
    position[order] = torch.arange(queue.numel(), device=queue.device) - first
    return position
