"""8-bit states beside torchao's, where rows are whole blocks: codes, scales, weights."""

import pytest
import torch
from torch import nn

from moesaic.ops.blockwise_quantization import dynamic_map, quantize
from moesaic.optim.optimizer import AdamW, EightBitStates

torchao = pytest.importorskip("torchao.optim", reason="needs torchao")
subclass = pytest.importorskip("torchao.optim.subclass_8bit", reason="needs torchao")

SHAPE, STEPS = (16, 512), 20  # torchao leaves tensors of fewer than 4,096 values in float32
CONFIG = AdamW(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, states=EightBitStates())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_those_of_torchao(signed):
    make = torch.Generator().manual_seed(0)
    values = torch.randn(SHAPE, generator=make) ** 5
    values = values if signed else values.square()
    theirs = subclass.OptimState8bit.zeros(SHAPE, signed)
    theirs.copy_(values)
    codes, scales = quantize(values, block=256, signed=signed)
    assert torch.equal(theirs.qmap, torch.from_numpy(dynamic_map(signed=signed).values))
    assert torch.equal(theirs.codes, codes)
    assert torch.equal(theirs.scale, scales.flatten())


def test_states_and_weights_are_nearly_those_of_torchao():
    """Sums are rounded in another order, so a value near the middle of two codes may differ.

    Of the codes after 20 steps at most one in 500 does, by one. Its weight is then less than a
    step apart; the others are by less than a hundredth of one.
    """
    make = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(SHAPE, generator=make))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = CONFIG.build([("w", ours)], kinds={"w": "matrix"})
    other = torchao.AdamW8bit([theirs], lr=CONFIG.lr, betas=CONFIG.betas, weight_decay=0.1)
    with torch.compiler.set_stance("force_eager"):  # it compiles the update of each shape
        for _ in range(STEPS):
            ours.grad = torch.randn(SHAPE, generator=make) ** 3
            theirs.grad = ours.grad.clone()
            optimizer.step()
            other.step()
    state = optimizer.state[ours]
    for slot in ("exp_avg", "exp_avg_sq"):
        apart = (state[slot].int() - other.state[theirs][slot].codes.int()).abs()
        assert int(apart.max()) <= 1
        assert int((apart > 0).sum()) * 500 <= apart.numel()
        scale = state[f"{slot}_scale"].flatten()
        torch.testing.assert_close(scale, other.state[theirs][slot].scale, rtol=1e-5, atol=0)
    apart = (ours - theirs).detach().abs() / CONFIG.lr
    assert float(apart.max()) < 1
    assert int((apart > 0.01).sum()) * 500 <= apart.numel()
