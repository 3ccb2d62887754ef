"""A short convolution equals its definition, gradients included."""

import pytest
import torch

from moesaic.ops.short_convolution import short_convolution
from ops.references import reference_short_convolution


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [1, 6])
def test_a_short_convolution_equals_its_definition(length: int, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, length, 3), (2, width - 1, 3), (3, width), (3,)]
    leaves = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    names = ("earlier", "weight", "bias")
    inputs = dict(zip(names, leaves[1:], strict=True))
    expected = reference_short_convolution(leaves[0], **inputs)
    found = short_convolution(leaves[0], **inputs)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, grad)
    for one, other in zip(torch.autograd.grad(found, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(one, other)
