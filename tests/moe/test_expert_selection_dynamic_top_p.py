"""Top-p takes the smallest prefix that passes p, the crossing expert included."""

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.moe.expert_selection_dynamic import TopP
from moesaic.moe.router_context import RouterContext

P = torch.tensor([[0.1, 0.5, 0.15, 0.25]])


def _route(rule, probability):
    return rule(RouterContext.from_logits(probability.log()))


@pytest.mark.parametrize(
    ("p", "experts"),
    [(0.0, [1]), (0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])],
)
def test_the_prefix_ends_with_the_expert_that_crosses_p(p, experts):
    routing = _route(TopP(p=p), P)
    assert routing.expert.tolist() == experts
    torch.testing.assert_close(routing.weight, P[0, experts])


def test_uncertain_tokens_get_more_experts():
    sure = torch.tensor([[0.97, 0.01, 0.01, 0.01]])
    even = torch.full((1, 4), 0.25)
    routing = _route(TopP(p=0.4), torch.cat([sure, even]))
    assert torch.bincount(routing.token).tolist() == [1, 2]


def test_top_p_that_is_never_reached_takes_all_and_one_that_is_reached_at_once_takes_one():
    """The edge that a first index of an all-false mask gets right or wrong by luck."""
    almost = 1 - 2**-24
    even = torch.full((1, 7), 1 / 7)
    certain = torch.tensor([[0.0, 200.0, 0.0, 0.0]])
    assert even.log().softmax(-1).cumsum(-1)[0, -1] <= 1
    assert sorted(_route(TopP(p=almost), even).expert.tolist()) == list(range(7))
    assert TopP(p=almost)(RouterContext.from_logits(certain)).expert.tolist() == [1]
    with pytest.raises(ConfigError, match="less than 1"):
        TopP(p=1.0)


def test_max_experts_keeps_the_most_probable():
    assert _route(TopP(p=0.95, max_experts=2), P).expert.tolist() == [1, 3]
    assert _route(TopP(p=0.95, max_experts=9), P).expert.tolist() == [0, 1, 2, 3]


def test_no_token_exceeds_the_counted_number_of_experts():
    for p, most in ((0.3, None), (0.8, None), (0.8, 3)):
        rule = TopP(p=p, max_experts=most)
        routing = rule(RouterContext.from_logits(0.01 * torch.randn(500, 9)))
        assert torch.bincount(routing.token).max() == rule.experts_per_token(9)


def test_gradients_are_those_of_plain_probabilities():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: TopP(p=0.6)(RouterContext.from_logits(x)).weight, [logits]
    )
