"""Out to edges and home to tokens equals the definition, for any number of edges per token."""

import pytest
import torch

from moesaic.ops.permute import (
    group_by_expert,
    permute,
    reference_permute,
    reference_unpermute,
    unpermute,
)

T, D, E = 13, 6, 4


def _edges(k):
    expert = torch.randint(0, E + 1, (T * k,), generator=torch.Generator().manual_seed(k))
    token = torch.arange(T).repeat_interleave(k)
    return token, group_by_expert(expert, num_experts=E)


def _some_edges():
    """Three edges in all for each two tokens, some of them lost, in no order."""
    draw = torch.Generator().manual_seed(1)
    token = torch.randint(0, T, (3 * T // 2,), generator=draw)
    expert = torch.randint(0, E + 1, token.shape, generator=draw)
    return token, group_by_expert(expert, num_experts=E)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_spread_equals_its_definition_with_gradients(k):
    token, groups = _edges(k) if k else _some_edges()
    x = torch.randn(T, D, requires_grad=True)
    weigh = torch.randn(len(token), D)
    want = reference_permute(x, token=token, groups=groups)
    got = permute(x, token=token, groups=groups, per_token=k)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad((y * weigh).sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_combine_equals_its_definition_with_gradients(k):
    token, groups = _edges(k) if k else _some_edges()
    y = torch.randn(len(token), D, requires_grad=True)
    weight = torch.rand(len(token), requires_grad=True)
    results = []
    for function, extra in ((unpermute, {"per_token": k}), (reference_unpermute, {})):
        out = function(y, token=token, weight=weight, groups=groups, num_tokens=T, **extra)
        results.append([out, *torch.autograd.grad(out.square().sum(), (y, weight))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_edges_in_any_order_come_home():
    token = torch.tensor([2, 0, 0, 2, 1])
    groups = group_by_expert(torch.tensor([1, 0, 1, 0, 1]), num_experts=2)
    x = torch.eye(3)
    rows = permute(x, token=token, groups=groups, per_token=0)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    home = unpermute(rows, token=token, weight=weight, groups=groups, num_tokens=3, per_token=0)
    assert torch.equal(home, torch.diag(torch.tensor([5.0, 5.0, 5.0])))


def test_halves_are_summed_in_float32():
    token, groups = _edges(2)
    y = torch.randn(2 * T, D).bfloat16()
    weight = torch.rand(2 * T)
    settings = {"token": token, "weight": weight, "groups": groups, "num_tokens": T}
    got = unpermute(y, per_token=2, **settings)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, reference_unpermute(y.float(), **settings).bfloat16())
