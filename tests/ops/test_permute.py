"""Permute and unpermute equal their references, for any number of edges per token."""

import pytest
import torch

from moesaic.ops.permute import group_by_expert, permute, unpermute
from ops.references import reference_unpermute

T, D, E = 13, 6, 4


def _edges(k):
    expert = torch.randint(0, E + 1, (T * k,), generator=torch.Generator().manual_seed(k))
    token = torch.arange(T).repeat_interleave(k)
    return token, group_by_expert(expert, num_experts=E)


def _some_edges():
    """Three edges for each two tokens, some of them dropped, in no order."""
    generator = torch.Generator().manual_seed(1)
    token = torch.randint(0, T, (3 * T // 2,), generator=generator)
    expert = torch.randint(0, E + 1, token.shape, generator=generator)
    return token, group_by_expert(expert, num_experts=E)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_permute_equals_its_definition_with_gradients(k):
    token, groups = _edges(k) if k else _some_edges()
    x = torch.randn(T, D, requires_grad=True)
    grad = torch.randn(len(token), D)
    want = x[token[groups.order]]
    got = permute(x, token=token, groups=groups, per_token=k)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad((y * grad).sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_unpermute_equals_its_definition_with_gradients(k):
    token, groups = _edges(k) if k else _some_edges()
    y = torch.randn(len(token), D, requires_grad=True)
    weight = torch.rand(len(token), requires_grad=True)
    results = []
    for function, extra in ((unpermute, {"per_token": k}), (reference_unpermute, {})):
        out = function(y, token=token, weight=weight, groups=groups, num_tokens=T, **extra)
        results.append([out, *torch.autograd.grad(out.square().sum(), (y, weight))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_edges_in_any_order_are_summed_by_token():
    token = torch.tensor([2, 0, 0, 2, 1])
    groups = group_by_expert(torch.tensor([1, 0, 1, 0, 1]), num_experts=2)
    x = torch.eye(3)
    rows = permute(x, token=token, groups=groups, per_token=0)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    out = unpermute(rows, token=token, weight=weight, groups=groups, num_tokens=3, per_token=0)
    assert torch.equal(out, torch.diag(torch.tensor([5.0, 5.0, 5.0])))


def test_halves_are_summed_in_float32():
    token, groups = _edges(2)
    y = torch.randn(2 * T, D).bfloat16()
    weight = torch.rand(2 * T)
    settings = {"token": token, "weight": weight, "groups": groups, "num_tokens": T}
    got = unpermute(y, per_token=2, **settings)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, reference_unpermute(y.float(), **settings).bfloat16())


def test_edges_are_sorted_by_expert_and_keep_their_order_within_it():
    expert = torch.tensor([2, 0, 3, 2, 0, 3])  # 3 of 3 experts: dropped
    groups = group_by_expert(expert, num_experts=3)
    assert groups.order.tolist() == [1, 4, 0, 3, 2, 5]
    assert groups.rows_per_expert.tolist() == [2, 0, 2]
    assert groups.offsets.tolist() == [2, 2, 4]
    assert groups.offsets.dtype == torch.int32


def test_inverse_is_the_inverse_of_order():
    groups = group_by_expert(torch.randint(0, 5, (100,)), num_experts=4)
    assert torch.equal(groups.inverse[groups.order], torch.arange(100))


def test_no_edges_are_no_rows():
    groups = group_by_expert(torch.empty(0, dtype=torch.long), num_experts=3)
    assert groups.offsets.tolist() == [0, 0, 0]
