"""Gradient clipping by the global norm, finite or not."""

import math

import pytest
import torch

from moesaic.optim.gradient_clipping import GradNorm, scale_gradients, tensor_norms


def tensors(scale=1.0, dtype=torch.float32):
    make = torch.Generator().manual_seed(0)
    found = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in ((4, 3), (7,), (2, 2, 2))]
    for p in found:
        p.grad = (scale * torch.randn(p.shape, generator=make)).to(dtype)
    return found


def clip_gradients(params, *, max_norm=math.inf) -> GradNorm:
    grads = [p.grad for p in params if p.grad is not None]
    return scale_gradients(
        grads, norm=float(torch.stack(tensor_norms(grads)).norm()), max_norm=max_norm
    )


def flat(params):
    return torch.cat([p.grad.flatten().double() for p in params])


def test_large_gradients_get_the_stated_norm_and_keep_their_direction():
    params = tensors(10.0)
    before = flat(params)
    result = clip_gradients(params, max_norm=1.0)
    assert result.norm == pytest.approx(float(before.norm()), rel=1e-6)
    torch.testing.assert_close(flat(params), before / before.norm(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [1e4, math.inf])
def test_small_gradients_are_only_measured(max_norm):
    params = tensors()
    before = flat(params)
    assert clip_gradients(params, max_norm=max_norm).factor == 1
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_is_scaled(bad):
    params = tensors()
    params[1].grad[0] = bad
    before = params[0].grad.clone()
    result = clip_gradients(params, max_norm=0.1)
    assert not result.finite
    assert torch.equal(params[0].grad, before)


def test_bfloat16_gradients_are_measured_in_float32():
    params = tensors(dtype=torch.bfloat16)
    assert clip_gradients(params).norm == pytest.approx(float(flat(params).norm()), rel=1e-5)
