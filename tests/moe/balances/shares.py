"""Scores of a batch as a whole and as the ranks that share it see it."""

from itertools import pairwise

import torch

from moesaic.moe.balance import Scores
from moesaic.moe.context import Context
from moesaic.moe.gate import Gate
from moesaic.moe.ranks import OneRank


class Told(OneRank):
    """Every sum over ranks is that of the probabilities."""

    def __init__(self, total):
        self.total = total

    def sum(self, counts):
        assert counts.shape == self.total.shape
        return self.total


def scores_of(logits, *, select, spare=0, state=None, parts=1):
    """The scores of each of ``parts`` ranks with an unequal share of the tokens."""
    cuts = [len(logits) * i * (i + 1) // (parts * (parts + 1)) for i in range(parts + 1)]
    whole = _gate(logits, spare, state)
    load = select(whole).load().double()
    tokens = torch.tensor(float(len(logits)), dtype=torch.float64)
    ranks = Told(select.probabilities(whole).detach().double().sum(0))
    for first, last in pairwise(cuts):
        gate = _gate(logits[first:last], spare, state)
        p, zero = select.probabilities(gate), torch.zeros_like(load)
        yield Scores(gate, select(gate), p, load, zero, tokens, ranks)


def _gate(logits, spare, state):
    context = Context.plain(len(logits))
    return Gate(logits, context, training=True, spare=spare, state=state or {})


def value_and_gradient(term, logits, **given):
    """The sum of all ranks' shares, and its gradient."""
    leaf = logits.clone().requires_grad_()
    total = sum(term(scores) for scores in scores_of(leaf, **given))
    return total.detach(), torch.autograd.grad(total, leaf)[0]
