"""Law: however many ranks share a batch, the loss, its parts and its gradients are the same."""

import pytest
import torch

from moesaic.dist.world import Alone, Ranks, World
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE, Sparse
from moesaic.moe.layer import learn, set_ranks
from moesaic.moe.limit import AtRandom, ByPosition, ByWeight, Capacity, Priority
from moesaic.moe.noise import Jitter
from moesaic.moe.select import Top2, TopK
from moesaic.optim.optimizer import AdamW
from moesaic.testing.ranks import run_on_ranks
from moesaic.testing.tiny import (
    BALANCED_TOP1,
    LANGUAGES,
    TASKS,
    random_batch,
    rows_of,
    tiny_model_config,
)
from moesaic.train.meters import Categories, Meters
from moesaic.train.precision import Float32
from moesaic.train.ranks import BatchRanks
from moesaic.train.step import Objective


def _capped(priority: Priority) -> MoE:
    return BALANCED_TOP1.replace(limit=Capacity(factor=0.7, minimum=0, priority=priority))


VARIANTS = {
    "dense": NoMoE(),
    "top1-balance-z": BALANCED_TOP1,
    "top2": MoE(experts=4, select=TopK(k=2)),
    "by-position": _capped(ByPosition()),
    "by-weight": _capped(ByWeight()),
    "random-token-selection": _capped(AtRandom()),
    "jitter": BALANCED_TOP1.replace(noise=Jitter(epsilon=0.2)),
    "sampled-second": MoE(experts=4, select=Top2(second="sampled")),
}
STEPS = 3
Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def _train(world: World, moe: Sparse, rows: int) -> Outcome:
    torch.manual_seed(0)
    model = Transformer(tiny_model_config(moe=moe))
    set_ranks(model, BatchRanks(world))
    categories = Categories(TASKS, LANGUAGES)
    objective = Objective(categories, smoothing=0.1, precision=Float32())
    optimizer = AdamW(eps=1e-5).build(model.named_parameters(), kinds=model.parameter_kinds())
    history = []
    for step in range(STEPS):
        batches = [random_batch(rows, seed=10 * step + micro) for micro in range(2)]
        mine = [rows_of(batch, rank=world.rank, world=world.size) for batch in batches]
        seen = objective.gradients(model, batches=mine, world=world)
        meters = Meters(categories, device=world.device)
        meters.add(seen.sums, norm=0.0)
        history.append(meters.take(world))
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        learn(model)
    return history, grads


def _on_rank(moe: Sparse, rows: int) -> Outcome:
    return _train(Ranks(), moe, rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_parallel_ranks_give_the_same_loss(size: int, variant: str) -> None:
    losses, grads = _train(Alone(), VARIANTS[variant], 8)
    for there, there_grads in run_on_ranks(size, _on_rank, VARIANTS[variant], 8):
        for here, row in zip(losses, there, strict=True):
            assert row == pytest.approx(here, rel=1e-6, abs=1e-9)
        for name, grad in grads.items():
            torch.testing.assert_close(there_grads[name], grad, rtol=2e-4, atol=1e-6, msg=name)


def test_a_rank_without_rows_takes_part() -> None:
    losses, _ = _train(Alone(), BALANCED_TOP1, 3)
    for there, _ in run_on_ranks(4, _on_rank, BALANCED_TOP1, 3):
        assert there[-1] == pytest.approx(losses[-1], rel=1e-6, abs=1e-9)
