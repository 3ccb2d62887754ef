"""A threshold routes each token by itself, so it is causal."""

import torch

from moesaic.moe.expert_selection_dynamic import Threshold
from moesaic.moe.router_context import RouterContext


def test_an_edge_exists_for_each_score_above_the_threshold():
    logits = torch.randn(50, 4)
    routing = Threshold(p=0.6)(RouterContext.from_logits(logits))
    score = logits.sigmoid()
    passed = score > 0.6
    assert torch.equal(torch.stack([routing.token, routing.expert], 1), passed.nonzero())
    torch.testing.assert_close(routing.weight, score[passed])


def test_one_expert_makes_a_mixture_of_depths():
    logits = torch.tensor([[1.0], [-1.0], [0.1], [0.0]])
    routing = Threshold()(RouterContext.from_logits(logits))
    assert routing.token.tolist() == [0, 2]
    assert routing.load().tolist() == [2]
    assert not routing.dropped.any()


def test_a_prefix_is_routed_the_same_with_and_without_what_follows():
    logits = torch.randn(30, 4)
    whole, part = (
        Threshold()(RouterContext.from_logits(logits)),
        Threshold()(RouterContext.from_logits(logits[:20])),
    )
    early = whole.token < 20
    assert torch.equal(whole.expert[early], part.expert)
    assert torch.equal(whole.weight[early], part.weight)


def test_gradients_are_those_of_the_sigmoid():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: Threshold()(RouterContext.from_logits(x)).weight, [logits]
    )
