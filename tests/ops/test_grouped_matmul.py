"""Every grouped GEMM multiplies rows by their experts' matrices as the reference does."""

import pytest
import torch

from moesaic.ops.grouped_gemm import grouped_matmul
from moesaic.ops.kernel_selection import GROUPED_GEMMS
from moesaic.ops.permute import group_by_expert
from ops.references import reference_grouped_matmul

D, F, E = 16, 8, 3
EXPERTS = {
    "even": [0, 1, 2, 0, 1, 2],
    "one-idle": [0, 2, 2, 0, 2, 2],
    "two-dropped": [0, 3, 2, 1, 3, 2],
}


@pytest.mark.parametrize("gemm", GROUPED_GEMMS)
@pytest.mark.parametrize("case", EXPERTS)
def test_a_grouped_product_equals_its_definition(case, gemm):
    groups = group_by_expert(torch.tensor(EXPERTS[case]), num_experts=E)
    rows = torch.randn(6, D, requires_grad=True)
    weight = torch.randn(E, D, F, requires_grad=True)
    grad_out = torch.randn(6, F)
    fast = grouped_matmul(rows, weight=weight, groups=groups, gemm=GROUPED_GEMMS[gemm])
    plain = reference_grouped_matmul(rows, weight=weight, groups=groups)
    torch.testing.assert_close(fast, plain)
    for got, want in zip(
        torch.autograd.grad((fast * grad_out).sum(), (rows, weight)),
        torch.autograd.grad((plain * grad_out).sum(), (rows, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_the_weight_is_cast_to_the_dtype_of_rows_and_its_gradient_is_not():
    groups = group_by_expert(torch.tensor([0, 1]), num_experts=2)
    weight = torch.randn(2, D, F, requires_grad=True)
    rows = torch.randn(2, D, dtype=torch.bfloat16)
    gemm = GROUPED_GEMMS["sequential"]
    out = grouped_matmul(rows, weight=weight, groups=groups, gemm=gemm)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
