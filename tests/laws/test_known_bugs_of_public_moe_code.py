"""Law: known bugs of public MoE code do not occur here."""

from dataclasses import replace

import pytest
import torch

from model.samples import BASE, batch_for, padded
from moe.variants import DIM, EXPERTS, layer
from moesaic.distributed.forked_ranks import run_cases_on_ranks
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.model.transformer import Transformer
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity, PositionPriority, RandomPriority, WeightPriority
from moesaic.moe.expert_selection import Top2, TopK
from moesaic.moe.expert_selection_dynamic import TopP
from moesaic.moe.router_context import RouterContext, RouterState, TokenContext
from moesaic.parallel.batch_ranks import BatchRanks

X = torch.randn(40, DIM)


def _drawn(moe, key):
    """The answer where random numbers are drawn under another key."""
    context = TokenContext.unbatched(40)
    context = replace(context, row_key=context.row_key + key)
    return moe(X, context=context, router_state=RouterState()).out


RANDOM = {
    "random-token-selection": {
        "limit": Capacity(factor=0.5, eval_factor=0.5, priority=RandomPriority())
    },
    "gumbel-second-choice": {"select": Top2(second="sampled")},
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_token_selection_and_the_gumbel_second_choice_are_off_in_evaluation(name):
    moe = layer(MoE(experts=EXPERTS, **RANDOM[name]))
    assert not torch.equal(_drawn(moe, 1), _drawn(moe, 2))
    moe.eval()
    assert torch.equal(_drawn(moe, 1), _drawn(moe, 2))


def _kept(priority, part, batch_group):
    """Which experts the edges of a part of the batch keep."""
    torch.manual_seed(0)
    logits = torch.randn(40, EXPERTS) + torch.linspace(2, 0, 40)[:, None] * torch.eye(EXPERTS)[0]
    whole = RouterContext.from_logits(logits, training=True)
    names = ("row", "position", "token", "tag", "row_key")
    local = {name: getattr(whole.context, name)[part] for name in names}
    gate = RouterContext(logits[part], replace(whole.context, **local), training=True)
    limit = Capacity(factor=0.7, minimum=0, priority=priority)
    return limit(TopK(k=2)(gate), gate, batch_group)


def _kept_of_rank(priority):
    world = ProcessGroupWorld()
    unequal = slice(0, 31), slice(31, 40)  # capacity of a rank's own tokens would drop others
    return _kept(priority, unequal[world.rank], BatchRanks(world)).expert


def test_capacity_counts_the_tokens_of_all_ranks():
    priorities = [PositionPriority(), WeightPriority(), RandomPriority()]
    results = run_cases_on_ranks(2, _kept_of_rank, priorities)
    for priority, kept in zip(priorities, results, strict=True):
        whole = _kept(priority, slice(0, 40), SingleRankBatch())
        assert torch.equal(torch.cat(kept), whole.expert), priority
        assert 0 < whole.dropped.sum() < 80


def test_top_p_takes_one_expert_of_a_certain_token_and_never_all_by_an_empty_mask():
    certain = 90 * torch.eye(EXPERTS)
    assert TopP(p=0.999)(RouterContext.from_logits(certain)).load().tolist() == [1] * EXPERTS


def test_a_balance_loss_never_counts_padding():
    model = Transformer(
        BASE.replace(moe=BASE.moe.replace(balance=(SwitchBalance(), RouterZLoss())))
    )
    batch = batch_for(BASE)
    tight, loose = model(batch).records, model(padded(batch, 50)).records
    for here, there in zip(tight, loose, strict=True):
        assert here.stats_vector[-1] == there.stats_vector[-1] == here.routing.num_tokens
        for name, value in here.losses.items():
            torch.testing.assert_close(there.losses[name], value, rtol=1e-5, atol=1e-7)
