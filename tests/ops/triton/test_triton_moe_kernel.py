"""The Triton kernel equals its definition, values and gradients, and saves what it declares."""

import pytest
import torch

from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.nn.feed_forward import GELU, FeedForwardConfig, ReLU, SwiGLU
from moesaic.ops.grouped_gemm import FeedForwardWeights, SequentialGEMM
from moesaic.ops.moe_kernel import Edges, MoEKernel, UnfusedMoEKernel
from moesaic.ops.triton.triton_moe_kernel import TritonMoEKernel, column_chunks
from ops.triton.cases import (
    DIM,
    EXPERTS,
    HIDDEN,
    ROUTES,
    SMALL,
    by_descriptor,
    definition,
    draw,
    edges_of,
)

KERNEL = TritonMoEKernel(tiles=SMALL)


def run(kernel, edges, activation, *, bias=False, dim=DIM, dtype=torch.float32):
    """Output and gradients, for inputs that the dtype represents exactly."""
    device = edges.token.device
    width = activation.width(HIDDEN)

    def leaf(*shape, scale=1.0):
        exact = draw(*shape, device=device, scale=scale, seed=shape[-1]).half().float()
        return exact.to(dtype).requires_grad_()

    x = leaf(edges.num_tokens, dim)
    weights = FeedForwardWeights(
        leaf(EXPERTS, dim, width, scale=0.2), leaf(EXPERTS, HIDDEN, dim, scale=0.2)
    )
    if bias:
        weights = FeedForwardWeights(
            weights.up, weights.down, leaf(EXPERTS, width), leaf(EXPERTS, dim)
        )
    weight = edges.weight.clone().requires_grad_()
    edges = Edges(edges.token, weight, edges.groups, edges.num_tokens, edges.per_token)
    out = kernel(x, edges=edges, weights=weights, activation=activation)
    leaves = [
        x,
        weight,
        *(t for t in (weights.up, weights.down, weights.up_bias, weights.down_bias)),
    ]
    leaves = [t for t in leaves if t is not None]
    back = draw(edges.num_tokens, dim, device=device).half().to(out.dtype)
    if not out.requires_grad:  # the definition of no edges
        return [out, *(torch.zeros_like(t) for t in leaves)]
    grads = torch.autograd.grad(out, leaves, back, allow_unused=True)
    full = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return [out.detach(), *full]


def agree(kernel, edges, activation, *, tolerance=1e-4, dtype=torch.float32, **options):
    got = run(kernel, edges, activation, dtype=dtype, **options)
    want = run(definition, edges, activation, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("route", ROUTES)
def test_the_kernel_equals_the_definition_whatever_the_routing(route, device):
    agree(KERNEL, edges_of(*ROUTES[route], device), SwiGLU())


@pytest.mark.parametrize("activation", [GELU(), SwiGLU()], ids=repr)  # a plain one, a gated one
def test_the_kernel_equals_the_definition_with_biases(activation, device):
    agree(KERNEL, edges_of(*ROUTES["some-dropped"], device), activation, bias=True)


@pytest.mark.parametrize("route", ["some-dropped", "no-tokens"])
def test_the_kernel_takes_any_edge_list(route, device):
    agree(KERNEL, edges_of(*ROUTES[route], device, general=True), ReLU())


def test_the_kernel_is_right_in_half_precision(device):
    agree(KERNEL, edges_of(*ROUTES["balanced"], device), SwiGLU(), dtype=torch.half, tolerance=2e-2)


def test_the_kernel_is_right_with_the_tiles_of_the_table(device):
    agree(TritonMoEKernel(), edges_of(*ROUTES["balanced"], device), SwiGLU())


def test_the_kernel_is_right_with_weights_read_by_descriptor(device):
    kernel = TritonMoEKernel(tiles=by_descriptor(SMALL))
    agree(kernel, edges_of(*ROUTES["some-dropped"], device), SwiGLU())


def test_expert_outputs_in_column_chunks_give_the_same(device):
    edges = edges_of(torch.full((6,), 1), 2, device)
    pieces, whole = (
        TritonMoEKernel(max_buffer_elements=0, tiles=SMALL),
        TritonMoEKernel(tiles=SMALL),
    )
    assert len(list(column_chunks(136, rows=6, width=HIDDEN, max_elements=0))) == 2
    for a, b in zip(*(run(m, edges, ReLU(), dim=136) for m in (pieces, whole)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("columns", "rows", "width"), [(4096, 1000, 1024), (1536, 1000, 512)])
def test_chunks_cover_all_columns_and_are_no_larger_than_the_saved_activations(
    columns, rows, width
):
    pieces = list(column_chunks(columns, rows=rows, width=width, max_elements=0))
    assert [c for piece in pieces for c in piece] == list(range(columns))
    assert max(map(len, pieces)) <= width


def test_the_same_bits_come_back_each_time(device):
    edges = edges_of(*ROUTES["some-dropped"], device)
    first, second = (run(KERNEL, edges, SwiGLU()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_that_are_not_contiguous_are_read_right(device):
    edges = edges_of(*ROUTES["balanced"], device)
    weights = FeedForwardWeights(
        draw(EXPERTS, HIDDEN, DIM, device=device).transpose(1, 2),
        draw(EXPERTS, DIM, HIDDEN, device=device).transpose(1, 2),
    )
    x = draw(DIM, edges.num_tokens, device=device).t()
    want = definition(x, edges=edges, weights=weights, activation=ReLU())
    got = KERNEL(x, edges=edges, weights=weights, activation=ReLU())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_float32_weights_under_half_rows_keep_float32_gradients(device):
    edges = edges_of(*ROUTES["balanced"], device)
    up = draw(EXPERTS, DIM, HIDDEN, device=device).requires_grad_()
    down = draw(EXPERTS, HIDDEN, DIM, device=device).requires_grad_()
    x = draw(edges.num_tokens, DIM, device=device, dtype=torch.half)
    out = KERNEL(x, edges=edges, weights=FeedForwardWeights(up, down), activation=ReLU())
    out.float().square().mean().backward()
    assert out.dtype == torch.half
    assert up.grad is not None
    assert up.grad.dtype == torch.float32


def test_only_x_the_pre_activation_and_the_routing_are_saved(device):
    kept = []
    edges = edges_of(*ROUTES["balanced"], device)
    x = draw(edges.num_tokens, DIM, device=device).requires_grad_()
    weights = FeedForwardWeights(
        draw(EXPERTS, DIM, 2 * HIDDEN, device=device).requires_grad_(),
        draw(EXPERTS, HIDDEN, DIM, device=device).requires_grad_(),
    )

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        KERNEL(x, edges=edges, weights=weights, activation=SwiGLU())
    addresses = {weights.up.data_ptr(), weights.down.data_ptr()}
    sizes = sorted(t.numel() for t in kept if t.data_ptr() not in addresses)
    assert sizes == sorted([edges.weight.numel(), x.numel(), edges.token.numel() * 2 * HIDDEN])


def test_without_gradients_the_pre_activation_is_not_even_written(device):
    edges = edges_of(*ROUTES["balanced"], device)
    x = draw(edges.num_tokens, DIM, device=device)
    weights = FeedForwardWeights(
        draw(EXPERTS, DIM, 2 * HIDDEN, device=device).requires_grad_(),
        draw(EXPERTS, HIDDEN, DIM, device=device),
    )
    trained = KERNEL(x, edges=edges, weights=weights, activation=SwiGLU())
    with torch.no_grad():
        out = KERNEL(x, edges=edges, weights=weights, activation=SwiGLU())
    assert trained.requires_grad
    assert not out.requires_grad
    assert torch.equal(out, trained)


def test_it_is_an_moe_kernel():
    assert isinstance(KERNEL, MoEKernel)


def test_a_layer_gives_the_same_with_the_kernels_as_without(device, monkeypatch):
    size = ExpertShape(
        EXPERTS, DIM, FeedForwardConfig(hidden=HIDDEN, activation=SwiGLU()), bias=True
    )
    experts = GroupedExperts(size)
    for seed, expert_weight in enumerate(experts.parameters()):
        expert_weight.data = draw(*expert_weight.shape, device=device, seed=seed, scale=0.2)
    edges = edges_of(*ROUTES["some-dropped"], device)
    x = draw(edges.num_tokens, DIM, device=device)
    results = []
    for kernel in (UnfusedMoEKernel(SequentialGEMM()), KERNEL):
        monkeypatch.setattr("moesaic.moe.experts.select_moe_kernel", lambda *_, m=kernel, **__: m)
        out = experts.forward_edges(x, edges=edges)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(experts.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
