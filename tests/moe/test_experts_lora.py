"""An expert is the shared feed-forward plus a low-rank change of its own."""

import pytest
import torch

from moesaic.moe.experts import ExpertShape, LoRAExpert
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.ops.permute import group_by_expert

D, F, E, RANK, ALPHA = 8, 12, 4, 3, 6.0
CHOSEN = torch.tensor([2, 0, 2, 1, 0, 2, E])  # expert 3 is idle, the last row was dropped


def _bank(*, bias, zero=False):
    size = ExpertShape(E, D, FeedForwardConfig(hidden=F, activation=SwiGLU()), bias=bias)
    bank = LoRAExpert(rank=RANK, alpha=ALPHA).build(size)
    for name, parameter in bank.named_parameters():
        torch.nn.init.normal_(parameter, std=0.4)
        if zero and name in bank.initializers():
            torch.nn.init.zeros_(parameter)
    return bank


def _definition(bank, rows, expert):
    """One dense feed-forward with the sum of both matrices."""
    scale = ALPHA / RANK
    up = bank.base.up.weight.t() + scale * bank.up_a[expert] @ bank.up_b[expert]
    down = bank.base.down.weight.t() + scale * bank.down_a[expert] @ bank.down_b[expert]
    hidden = rows @ up + (0 if bank.base.up.bias is None else bank.base.up.bias)
    out = bank.activation(hidden) @ down
    return out + (0 if bank.base.down.bias is None else bank.base.down.bias)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_each_row_uses_the_weights_of_its_expert(bias):
    bank, x = _bank(bias=bias), torch.randn(7, D, requires_grad=True)
    groups = group_by_expert(CHOSEN, num_experts=E)
    out = bank(x[groups.order], groups=groups)[groups.inverse]
    rows = [
        torch.zeros(D) if int(e) == E else _definition(bank, x[i], int(e))
        for i, e in enumerate(CHOSEN)
    ]
    wanted, leaves = torch.stack(rows), [x, *bank.parameters()]
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    weigh = torch.randn(7, D)
    got = torch.autograd.grad((out * weigh).sum(), leaves)
    want = torch.autograd.grad((wanted * weigh).sum(), leaves)
    for here, there in zip(got, want, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_every_expert_starts_as_the_shared_feed_forward():
    bank, x = _bank(bias=True, zero=True), torch.randn(4, D)
    groups = group_by_expert(torch.arange(E), num_experts=E)
    torch.testing.assert_close(bank(x, groups=groups), bank.base(x))


def test_the_change_is_learnt_from_its_zero_start():
    bank, x = _bank(bias=False, zero=True), torch.randn(4, D)
    bank(x, groups=group_by_expert(torch.arange(E), num_experts=E)).square().sum().backward()
    assert (bank.up_b.grad.flatten(1).abs().sum(1) > 0).all()
    assert bank.up_a.grad.abs().sum() == 0  # until its partner has moved


def test_autocast_computes_in_half_and_trains_float32_banks():
    bank, x = _bank(bias=True), torch.randn(4, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = bank(x, groups=group_by_expert(torch.arange(E), num_experts=E))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in bank.parameters()} == {torch.float32}
