"""Balance over a whole step, and over each rank's part of a micro-batch."""

from dataclasses import replace

import torch

from moe.balance_cases import EXPERTS, TOKENS, balance_inputs, shares
from moesaic.moe.auxiliary_losses import GlobalBatchBalance, MicroBatchBalance, SwitchBalance
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router import Router
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex


def test_the_last_micro_batch_sees_the_load_of_one_large_batch():
    config = MoE(experts=4, select=TopK(k=1), balance=(GlobalBatchBalance(weight=1.0),))
    router = Router(config, dim=6, layer_index=LayerIndex("test.0"))
    torch.nn.init.normal_(router.gate.weight)
    x = torch.randn(60, 6)

    def route(part):
        return router(
            part,
            context=TokenContext.unbatched(len(part)),
            router_state=RouterState(),
            batch_group=SingleRankBatch(),
        )

    whole = route(x).routing.load().double()
    losses = []
    for part in x.split(20):
        routed = route(part)
        losses.append(routed.losses["balance"])
        router.accumulate_stats(routed.stats_vector)
    mean = routed.logits.softmax(-1).mean(0)
    want = 4 * (whole / 60).float() @ mean
    torch.testing.assert_close(losses[-1], want)
    router.update_rules()
    torch.testing.assert_close(route(x.split(20)[0]).losses["balance"], losses[0])


def test_rows_of_one_domain_cost_little_if_the_step_is_balanced():
    logits = torch.full((TOKENS, EXPERTS), -30.0)
    logits[:, :2] = 30.0  # this micro-batch takes experts 0 and 1; those before took the others
    scores = balance_inputs(logits)
    accumulated_load = TOKENS * torch.ones(EXPERTS, dtype=torch.float64)
    accumulated_load[:2] = 0
    even = GlobalBatchBalance(weight=1)(replace(scores, accumulated_load=accumulated_load))
    torch.testing.assert_close(even, torch.tensor(1.0))
    torch.testing.assert_close(SwitchBalance(weight=1)(scores), torch.tensor(EXPERTS / 2))


def test_the_micro_batch_loss_is_the_mean_over_ranks_with_tokens():
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    term = MicroBatchBalance(weight=0.3)
    alone = [
        SwitchBalance(weight=0.3)(balance_inputs(part, lengths=[len(part)]))
        for part in (logits[:12], logits[12:])
    ]
    want = (alone[0] + alone[1]) / 2
    got = torch.stack(shares(term, logits, rows=[2, 0, 4])).sum()
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, logits)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)
    whole = torch.stack(shares(SwitchBalance(weight=0.3), logits, rows=[2, 0, 4])).sum()
    assert not torch.isclose(got, whole)
