"""What balance terms look at, for tests: a whole batch, or the parts of it that ranks hold."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moesaic.core.shapes import Tensor
from moesaic.moe.balance import Balance, Scores
from moesaic.moe.context import Context
from moesaic.moe.gate import Gate
from moesaic.moe.ranks import OneRank
from moesaic.moe.select import Select, TopK

LENGTHS = (3, 9, 1, 20, 5, 26)  # tokens of each row
TOKENS, EXPERTS = sum(LENGTHS), 8


class Added(OneRank):
    """Ranks in one process: first what each part adds is heard, then the n-th call is answered."""

    def __init__(self) -> None:
        self.parts: list[list[Tensor]] = []
        self.answers: list[Tensor] = []

    def sum(self, counts: Tensor) -> Tensor:
        if self.answers:
            return self.answers.pop(0)
        self.parts[-1].append(counts)
        return counts

    def totals(self) -> list[Tensor]:
        return [torch.stack(calls).sum(0) for calls in zip(*self.parts, strict=True)]


def scores_of(
    logits: Tensor,
    *,
    select: Select | None = None,
    lengths: Sequence[int] = LENGTHS,
    term: Balance | None = None,
    ranks: OneRank | None = None,
) -> Scores:
    """The scores of one rank that has these rows, alone or (``ranks``) as one of several."""
    rule = select or TopK(k=2)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).long())
    context = replace(Context.plain(len(logits)), row=row)
    state = term.start(logits.shape[1]) if term else {}
    gate = Gate(logits, context, training=True, state=state)
    routing = rule(gate)
    load = routing.load().double()
    tokens = torch.tensor(float(len(logits)), dtype=torch.float64)
    return Scores(
        gate=gate,
        routing=routing,
        probabilities=rule.probabilities(gate),
        load=load,
        heard=torch.zeros_like(load),
        tokens=tokens,
        ranks=ranks or OneRank(),
    )


def shares(term: Balance, logits: Tensor, *, rows: Sequence[int]) -> list[Tensor]:
    """Each rank's share, where rank i has the next ``rows[i]`` rows of the batch."""
    lengths, ranks, held = list(LENGTHS), Added(), []
    for count in rows:
        mine, lengths = lengths[:count], lengths[count:]
        part, logits = logits[: sum(mine)], logits[sum(mine) :]
        held.append(scores_of(part, lengths=mine, term=term, ranks=ranks))
    load, tokens = sum(s.load for s in held), sum(s.tokens for s in held)
    held = [replace(s, load=load, tokens=tokens) for s in held]
    for each in held:
        ranks.parts.append([])
        term(each)
    totals, found = ranks.totals(), []
    for each in held:
        ranks.answers = list(totals)
        found.append(term(each))
    return found
