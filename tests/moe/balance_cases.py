"""Inputs of balance terms for tests: of a whole batch, or of each rank's part of it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import torch

from moesaic.core.shapes import Tensor
from moesaic.moe.auxiliary_losses import Balance, BalanceInputs
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.expert_selection import Select, TopK
from moesaic.moe.router_context import RouterContext, TokenContext

LENGTHS = (3, 9, 1, 20, 5, 26)  # tokens of each row
TOKENS, EXPERTS = sum(LENGTHS), 8


class ThreadCollective:
    """A collective over ranks that are threads of one process."""

    def __init__(self, size: int) -> None:
        self._all, self._given = Barrier(size, timeout=20), [torch.empty(0)] * size

    def exchange(self, value: Tensor, *, rank: int) -> list[Tensor]:
        """Return what every rank gave, in order."""
        self._given[rank] = value
        self._all.wait()
        given = list(self._given)
        self._all.wait()
        return given


class ThreadBatchGroup(SingleRankBatch):
    """The batch group of one of these ranks."""

    def __init__(self, meeting: ThreadCollective, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def sum(self, counts: Tensor) -> Tensor:
        return torch.stack(self._meeting.exchange(counts, rank=self._rank)).sum(0)


def balance_inputs(
    logits: Tensor,
    *,
    select: Select | None = None,
    lengths: Sequence[int] = LENGTHS,
    term: Balance | None = None,
    ranks: SingleRankBatch | None = None,
    first: int = 0,
) -> BalanceInputs:
    """The balance inputs of one rank with these rows, alone or in a batch group.

    ``first`` is how many rows of the batch come before.
    """
    rule = select or TopK(k=2)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    one = TokenContext.unbatched(len(logits))
    context = replace(one, row=row, row_key=row + first, num_rows=len(lengths))
    state = term.initial_state(logits.shape[1]) if term else {}
    gate = RouterContext(logits, context, training=True, state=state)
    routing = rule(gate)
    load = routing.load().double()
    tokens = torch.tensor(float(len(logits)), dtype=torch.float64)
    return BalanceInputs(
        router=gate,
        routing=routing,
        probabilities=rule.probabilities(gate),
        load=load,
        accumulated_load=torch.zeros_like(load),
        num_tokens=tokens,
        batch_group=ranks or SingleRankBatch(),
    )


def shares(term: Balance, logits: Tensor, *, rows: Sequence[int]) -> list[Tensor]:
    """Each rank's share, where rank i has the next ``rows[i]`` rows of the batch."""
    lengths, meeting, held, first = list(LENGTHS), ThreadCollective(len(rows)), [], 0
    for rank, count in enumerate(rows):
        mine, lengths = lengths[:count], lengths[count:]
        part, logits = logits[: sum(mine)], logits[sum(mine) :]
        ranks = ThreadBatchGroup(meeting, rank)
        held.append(balance_inputs(part, lengths=mine, term=term, ranks=ranks, first=first))
        first += count
    load, tokens = sum(s.load for s in held), sum(s.num_tokens for s in held)
    held = [replace(s, load=load, num_tokens=tokens) for s in held]
    with ThreadPoolExecutor(len(held)) as pool:
        return list(pool.map(term, held))
