"""The router decides in float32 and returns its losses in training only."""

import torch

from moesaic.moe.balance import RouterZ, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.reduce import LocalReduce
from moesaic.moe.router import Router

D, E = 16, 4


def _router(**fields):
    router = Router(MoE(experts=E, **fields), dim=D)
    torch.nn.init.normal_(router.weight)
    return router


def test_autocast_and_half_inputs_do_not_round_the_decision():
    router, x = _router(), torch.randn(50, D).bfloat16()
    plain = router(x.float(), reduce=LocalReduce()).routing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = router(x, reduce=LocalReduce()).routing
    assert half.weight.dtype == torch.float32
    assert torch.equal(plain.weight, half.weight)


def test_losses_exist_in_training_only_and_same_names_add_up():
    x = torch.randn(50, D)
    router = _router(balance=(SwitchBalance(), RouterZ(), RouterZ()))
    losses = router(x, reduce=LocalReduce()).losses
    assert set(losses) == {"balance", "z"}
    single = _router(balance=(RouterZ(),))
    single.load_state_dict(router.state_dict())
    torch.testing.assert_close(losses["z"], 2 * single(x, reduce=LocalReduce()).losses["z"])
    router.eval()
    assert router(x, reduce=LocalReduce()).losses == {}


def test_counts_go_through_the_reduce_once():
    seen = []

    def double(counts):
        seen.append(counts)
        return counts * 2  # as if another rank had the same tokens

    router, x = _router(balance=(SwitchBalance(), RouterZ())), torch.randn(50, D)
    shared = router(x, reduce=double).losses
    alone = router(x, reduce=LocalReduce()).losses
    assert len(seen) == 1
    assert seen[0][-1] == 50
    for name in alone:
        torch.testing.assert_close(shared[name] * 2, alone[name])


def test_no_tokens_have_no_losses_but_take_part():
    losses = _router()(torch.randn(0, D), reduce=LocalReduce()).losses
    assert losses["balance"].item() == 0
    losses["balance"].backward()
