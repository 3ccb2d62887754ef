"""The unfused kernel computes the weighted sum over edges."""

import pytest
import torch

from moesaic.nn.feed_forward import ReLU
from moesaic.ops.grouped_gemm import FeedForwardWeights
from moesaic.ops.kernel_selection import GROUPED_GEMMS
from moesaic.ops.moe_kernel import Edges, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert

T, K, E, D, F = 9, 2, 4, 8, 12


@pytest.mark.parametrize("gemm", GROUPED_GEMMS)
@pytest.mark.parametrize("per_token", [K, 0], ids=["token-major", "any order"])
def test_the_unfused_kernel_is_the_sum_over_edges(gemm, per_token):
    token = torch.arange(T).repeat_interleave(K)
    expert = torch.randint(E + 1, (T * K,))  # some are dropped
    weight = torch.where(expert == E, 0.0, torch.rand(T * K))
    x, up, down = torch.randn(T, D), torch.randn(E, D, F), torch.randn(E, F, D)
    edges = Edges(token, weight, group_by_expert(expert, num_experts=E), T, per_token)
    got = UnfusedMoEKernel(GROUPED_GEMMS[gemm])(
        x, edges=edges, weights=FeedForwardWeights(up, down), activation=ReLU()
    )
    want = torch.zeros(T, D)
    for t, e, w in zip(token.tolist(), expert.tolist(), weight.tolist(), strict=True):
        if e < E:
            want[t] += w * ((x[t] @ up[e]).relu() @ down[e])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
