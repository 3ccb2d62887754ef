"""All experts are used in training; an inference rule selects some."""

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.moe.expert_selection_dynamic import (
    AllAtInference,
    DenseAll,
    ThresholdAtInference,
    TopKAtInference,
)
from moesaic.moe.router_context import RouterContext

T, E = 40, 5


def test_every_expert_is_weighted_by_its_probability_in_training():
    logits = torch.randn(T, E)
    for inference in (TopKAtInference(k=1), ThresholdAtInference(), AllAtInference()):
        routing = DenseAll(inference=inference)(RouterContext.from_logits(logits, training=True))
        assert routing.load().tolist() == [T] * E
        torch.testing.assert_close(routing.weight.view(T, E), logits.softmax(-1))


def test_top_k_in_inference_keeps_plain_probabilities():
    logits = torch.randn(T, E)
    routing = DenseAll(inference=TopKAtInference(k=2))(RouterContext.from_logits(logits))
    p, expert = logits.softmax(-1).topk(2)
    assert torch.equal(routing.expert.view(T, 2), expert)
    torch.testing.assert_close(routing.weight.view(T, 2), p)
    assert TopKAtInference(k=9)(torch.ones(2, 3)).load().tolist() == [2, 2, 2]


def test_a_threshold_keeps_at_least_one_expert():
    logits = torch.cat([torch.randn(T, E), torch.zeros(1, E)])
    routing = DenseAll(inference=ThresholdAtInference(epsilon=0.999))(
        RouterContext.from_logits(logits)
    )
    p = logits.softmax(-1)
    assert torch.equal(torch.stack([routing.token, routing.expert], 1), (p * E > 0.999).nonzero())
    assert torch.bincount(routing.token, minlength=T + 1).min() >= 1
    with pytest.raises(ConfigError, match="less than 1"):
        ThresholdAtInference(epsilon=1.0)


def test_a_threshold_of_nearly_nothing_is_all_experts():
    logits = torch.randn(T, E)
    few = DenseAll(inference=ThresholdAtInference(epsilon=1e-6))(RouterContext.from_logits(logits))
    every = DenseAll(inference=AllAtInference())(RouterContext.from_logits(logits))
    assert torch.equal(few.expert, every.expert)
    assert torch.equal(few.weight, every.weight)


def test_every_logit_gets_a_gradient():
    logits = torch.randn(T, E, requires_grad=True)
    weigh = torch.randn(T * E)
    (DenseAll()(RouterContext.from_logits(logits, training=True)).weight * weigh).sum().backward()
    assert (logits.grad != 0).all()
