"""The streaming rule gives the published number, and follows from the times of its two sides."""

import pytest

from moesaic.memory.streaming_rule import (
    StreamingRates,
    hidden_backward_tokens,
    hidden_forward_tokens,
    tokens_per_expert,
)


def test_a_gh200_hides_bfloat16_weights_from_1467_tokens_per_expert_on():
    rates = StreamingRates(flops=594e12, fetch=405e9, write=170e9)  # 60 % and 90 % of the peaks
    assert hidden_forward_tokens(rates, weight_bytes=2) == pytest.approx(1467, rel=1e-3)
    # the slower link away decides in backward
    assert hidden_backward_tokens(rates, weight_bytes=2, gradient_bytes=2) == pytest.approx(
        594e12 / 4 * 2 / 170e9
    )


def test_at_the_threshold_the_products_take_as_long_as_the_fetch():
    rates, weights = StreamingRates(flops=1e9, fetch=1e6, write=1e6), 1000
    tokens = hidden_forward_tokens(rates, weight_bytes=4)
    assert 2 * tokens * weights / rates.flops == pytest.approx(4 * weights / rates.fetch)
    tokens = hidden_backward_tokens(rates, weight_bytes=4, gradient_bytes=0)
    assert 4 * tokens * weights / rates.flops == pytest.approx(4 * weights / rates.fetch)


def test_more_experts_have_fewer_tokens_each():
    assert tokens_per_expert(4096, experts=64, experts_per_token=2) == 128
