"""The local dispatcher computes the definition: permute, experts, unpermute and sum."""

import torch

from moesaic.moe.dispatcher import Dispatcher, LocalDispatcher, apply_experts, sort_edges
from moesaic.moe.expert_selection import TopK
from moesaic.moe.experts import ExpertModule
from moesaic.moe.router_context import RouterContext

T, E, D = 20, 5, 4


class Recorder(ExpertModule):
    """Experts that return their input and keep it."""

    def forward(self, rows, *, groups):
        self.rows, self.groups = rows, groups
        return rows


def test_rows_reach_the_experts_sorted_by_expert_and_are_summed_by_weight():
    routing = TopK(k=2)(RouterContext.from_logits(torch.randn(T, E)))
    x, experts, dispatcher = torch.randn(T, D), Recorder(), LocalDispatcher()
    assert isinstance(dispatcher, Dispatcher)
    y = dispatcher.run_experts(x, routing=routing, experts=experts)
    torch.testing.assert_close(y, x)  # the weights of a token sum to one
    start = 0
    for expert, count in enumerate(experts.groups.rows_per_expert.tolist()):
        tokens = routing.token[routing.expert == expert]
        assert torch.equal(experts.rows[start : start + count], x[tokens])
        start += count


def test_experts_applied_to_unsorted_rows_keep_their_order():
    routing = TopK(k=1)(RouterContext.from_logits(torch.randn(T, E)))
    x = torch.randn(T, D)
    y = apply_experts(x, groups=sort_edges(routing).groups, experts=Recorder())
    assert torch.equal(y, x)
