"""Balance inputs of a batch on one rank and split over several ranks."""

from itertools import pairwise

import torch

from moesaic.moe.auxiliary_losses import BalanceInputs
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.router_context import RouterContext, TokenContext


class FixedSum(SingleRankBatch):
    """A batch group whose sum is that of the probabilities."""

    def __init__(self, total):
        self.total = total

    def sum(self, counts):
        assert counts.shape == self.total.shape
        return self.total


def balance_inputs(logits, *, select, num_null_experts=0, state=None, parts=1):
    """The balance inputs of each of ``parts`` ranks with unequal numbers of tokens."""
    cuts = [len(logits) * i * (i + 1) // (parts * (parts + 1)) for i in range(parts + 1)]
    whole = _router(logits, num_null_experts, state)
    load = select(whole).load().double()
    tokens = torch.tensor(float(len(logits)), dtype=torch.float64)
    ranks = FixedSum(select.probabilities(whole).detach().double().sum(0))
    for first, last in pairwise(cuts):
        gate = _router(logits[first:last], num_null_experts, state)
        p, zero = select.probabilities(gate), torch.zeros_like(load)
        yield BalanceInputs(gate, select(gate), p, load, zero, tokens, ranks)


def _router(logits, num_null_experts, state):
    context = TokenContext.unbatched(len(logits))
    return RouterContext(
        logits, context, training=True, num_null_experts=num_null_experts, state=state or {}
    )


def value_and_gradient(term, logits, **given):
    """The sum of all ranks' shares, and its gradient."""
    leaf = logits.clone().requires_grad_()
    total = sum(term(scores) for scores in balance_inputs(leaf, **given))
    return total.detach(), torch.autograd.grad(total, leaf)[0]
