"""Every grouped GEMM gives the reference's feed-forward and matmul, values and gradients."""

import pytest
import torch

from moesaic.nn.feed_forward import GELU, ReLU, SquaredReLU, SwiGLU
from moesaic.ops.grouped_gemm import (
    FeedForwardWeights,
    expert_of_row,
    grouped_feed_forward,
)
from moesaic.ops.kernel_selection import GROUPED_GEMMS
from moesaic.ops.permute import group_by_expert
from ops.references import reference_feed_forward

D, HIDDEN, E = 8, 12, 4
ROUTES = {
    "balanced": torch.arange(40) % E,
    "skewed": torch.randint(0, E, (33,), generator=torch.Generator().manual_seed(1)) ** 2 % E,
    "one-expert": torch.full((20,), 2),
    "some-dropped": torch.arange(37) % (E + 1),
    "all-dropped": torch.full((5,), E),
    "one-row": torch.tensor([3]),
    "no-rows": torch.empty(0, dtype=torch.long),
}


def _run(compute, expert, activation, *, bias, **options):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    rows = leaf(expert.numel(), D)
    up, down = leaf(E, D, activation.width(HIDDEN)), leaf(E, HIDDEN, D)
    biases = (leaf(E, activation.width(HIDDEN)), leaf(E, D)) if bias else ()
    groups = group_by_expert(expert, num_experts=E)
    weights = FeedForwardWeights(up, down, *biases)
    out = compute(rows, weights=weights, groups=groups, activation=activation, **options)
    leaves = [rows, up, down, *biases]
    loss = out.square().sum() + 0 * rows.sum()  # in the graph even if no row has an expert
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    full = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return [out.detach(), *full]


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("gemm", GROUPED_GEMMS)
def test_a_gemm_equals_the_definition_with_gradients(gemm, route, bias):
    options = {"bias": bias}
    want = _run(reference_feed_forward, ROUTES[route], SwiGLU(), **options)
    got = _run(grouped_feed_forward, ROUTES[route], SwiGLU(), gemm=GROUPED_GEMMS[gemm], **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [ReLU(), GELU(), SquaredReLU()], ids=repr)
def test_any_activation_is_differentiated(activation):
    want = _run(reference_feed_forward, ROUTES["skewed"], activation, bias=False)
    gemm = GROUPED_GEMMS["sequential"]
    got = _run(grouped_feed_forward, ROUTES["skewed"], activation, bias=False, gemm=gemm)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gemm", GROUPED_GEMMS)
def test_an_expanded_gradient_is_fine(gemm):
    groups = group_by_expert(torch.arange(8) % E, num_experts=E)
    rows = torch.randn(8, D, requires_grad=True)
    up, down = torch.randn(E, D, HIDDEN), torch.randn(E, HIDDEN, D)
    out = grouped_feed_forward(
        rows,
        weights=FeedForwardWeights(up, down),
        groups=groups,
        activation=ReLU(),
        gemm=GROUPED_GEMMS[gemm],
    )
    out.sum().backward()  # the gradient of a sum has stride 0
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_only_the_input_and_the_pre_activation_are_saved():
    saved = []
    groups = group_by_expert(torch.arange(16) % E, num_experts=E)
    rows = torch.randn(16, D, requires_grad=True)
    up = torch.randn(E, D, 2 * HIDDEN, requires_grad=True)
    weights = FeedForwardWeights(up, torch.randn(E, HIDDEN, D, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_feed_forward(
            rows,
            weights=weights,
            groups=groups,
            activation=SwiGLU(),
            gemm=GROUPED_GEMMS["sequential"],
        )
    sizes = sorted(t.numel() for t in saved if t.dim() == 2)
    assert sizes == [16 * D, 16 * 2 * HIDDEN]


def test_the_expert_of_a_row_skips_empty_experts():
    groups = group_by_expert(torch.tensor([1, 3, 3]), num_experts=E)
    assert expert_of_row(groups, rows=3).tolist() == [1, 3, 3]
