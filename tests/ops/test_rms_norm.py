"""The norm equals torch's, values and gradients, and keeps less."""

import torch
import torch.nn.functional as F

from moesaic.ops.rms_norm import rms_norm


def test_it_equals_torch_with_gradients():
    x = torch.randn(17, 12, requires_grad=True)
    weight = torch.rand(12, requires_grad=True)
    grad = torch.randn(17, 12)
    got = torch.autograd.grad(rms_norm(x, weight=weight, eps=1e-6), (x, weight), grad)
    want = torch.autograd.grad(F.rms_norm(x, (12,), weight, 1e-6), (x, weight), grad)
    torch.testing.assert_close(rms_norm(x, weight=weight, eps=1e-6), F.rms_norm(x, (12,), weight))
    torch.testing.assert_close(got, want)


def test_a_zero_row_stays_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, weight=torch.ones(4), eps=1e-6).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
