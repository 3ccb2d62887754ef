"""Every engine's product of rows with their experts' matrices is the definition's."""

import pytest
import torch

from moesaic.ops.grouped_gemm import grouped_matmul, reference_grouped_matmul
from moesaic.ops.kernel_selection import GROUPED_GEMMS
from moesaic.ops.permute import group_by_expert

D, F, E = 16, 8, 3
EXPERTS = {
    "even": [0, 1, 2, 0, 1, 2],
    "one-idle": [0, 2, 2, 0, 2, 2],
    "two-dropped": [0, 3, 2, 1, 3, 2],
}


@pytest.mark.parametrize("engine", GROUPED_GEMMS)
@pytest.mark.parametrize("case", EXPERTS)
def test_a_grouped_product_equals_its_definition(case, engine):
    groups = group_by_expert(torch.tensor(EXPERTS[case]), num_experts=E)
    rows = torch.randn(6, D, requires_grad=True)
    bank = torch.randn(E, D, F, requires_grad=True)
    weigh = torch.randn(6, F)
    fast = grouped_matmul(rows, weight=bank, groups=groups, gemm=GROUPED_GEMMS[engine])
    plain = reference_grouped_matmul(rows, weight=bank, groups=groups)
    torch.testing.assert_close(fast, plain)
    for got, want in zip(
        torch.autograd.grad((fast * weigh).sum(), (rows, bank)),
        torch.autograd.grad((plain * weigh).sum(), (rows, bank)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_the_bank_takes_the_dtype_of_rows_and_keeps_its_own_gradient():
    groups = group_by_expert(torch.tensor([0, 1]), num_experts=2)
    bank = torch.randn(2, D, F, requires_grad=True)
    rows = torch.randn(2, D, dtype=torch.bfloat16)
    engine = GROUPED_GEMMS["segments"]
    out = grouped_matmul(rows, weight=bank, groups=groups, gemm=engine)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert bank.grad is not None
    assert bank.grad.dtype == torch.float32
