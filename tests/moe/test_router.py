"""The router decides in float32 and returns its losses in training only."""

import torch

from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.router import Router
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex

D, E = 16, 4


def _router(**fields):
    router = Router(MoE(experts=E, **fields), dim=D, layer_index=LayerIndex("test.0"))
    torch.nn.init.normal_(router.gate.weight)
    return router


def _route(router, x, *, ranks=None):
    context = TokenContext.unbatched(len(x))
    return router(
        x, context=context, router_state=RouterState(), batch_group=ranks or SingleRankBatch()
    )


def test_autocast_and_half_inputs_do_not_change_the_routing():
    router, x = _router(), torch.randn(50, D).bfloat16()
    plain = _route(router, x.float()).routing
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = _route(router, x).routing
    assert half.weight.dtype == torch.float32
    assert torch.equal(plain.weight, half.weight)


def test_losses_exist_in_training_only_and_same_names_add_up():
    x = torch.randn(50, D)
    router = _router(balance=(SwitchBalance(), RouterZLoss(), RouterZLoss()))
    losses = _route(router, x).losses
    assert set(losses) == {"balance", "z"}
    single = _router(balance=(RouterZLoss(),))
    single.load_state_dict(router.state_dict())
    torch.testing.assert_close(losses["z"], 2 * _route(single, x).losses["z"])
    router.eval()
    assert _route(router, x).losses == {}


def test_statistics_are_summed_over_ranks_once():
    seen = []

    class Twice(SingleRankBatch):
        def sum(self, counts):
            seen.append(counts)
            return counts * 2  # as if another rank had the same tokens

    router, x = _router(balance=(SwitchBalance(), RouterZLoss())), torch.randn(50, D)
    shared = _route(router, x, ranks=Twice()).losses
    alone = _route(router, x).losses
    assert len(seen) == 1
    assert seen[0][-1] == 50
    for name in alone:
        torch.testing.assert_close(shared[name] * 2, alone[name])


def test_a_rank_without_tokens_takes_part_in_collectives():
    losses = _route(_router(), torch.randn(0, D)).losses
    assert losses["balance"].item() == 0
    losses["balance"].backward()
