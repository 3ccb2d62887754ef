"""A gated norm equals its definition, gradients included."""

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Tensor
from moesaic.ops.gated_rms_norm import gated_rms_norm


def _definition(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    parts = (x * F.silu(gate)).chunk(2, 1)
    return torch.cat([F.rms_norm(part, (3,), eps=1e-5) for part in parts], 1) * weight


def test_a_gated_norm_equals_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 6), (5, 6), (6,)]
    leaves = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    x, gate, weight = leaves
    expected = _definition(x, gate, weight)
    found = gated_rms_norm(x, gate=gate, weight=weight, groups=2, eps=1e-5)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for one, other in zip(torch.autograd.grad(found, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(one, other)
