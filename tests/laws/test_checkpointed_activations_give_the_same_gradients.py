"""Law: activation checkpointing changes no gradient, for every dispatch without ZeRO and in ZeRO 3.

ZeRO 1 and 2, which change what is sent for gradients alone, are run with one dispatch.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch.distributed.tensor import DTensor

from moesaic.core.shapes import Tensor
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import RecurrentRouting
from moesaic.moe.expert_selection import TopK
from moesaic.parallel.activation_checkpointing import (
    CheckpointBlocks,
    CheckpointBranches,
    CheckpointCheapOperations,
    NoActivationCheckpointing,
)
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert_dispatch import (
    AdaptiveExperts,
    AllToAll,
    ChunkedAllToAll,
    HierarchicalAllToAll,
)
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.precision import Float32
from moesaic.testing.tiny_models import LABELS, random_batch, tiny_model_config
from moesaic.train.running_metrics import LossCategories
from moesaic.train.step import Objective

RANKS = 2
DISPATCHES = (
    AllToAll(),
    ChunkedAllToAll(),
    AdaptiveExperts(),
    HierarchicalAllToAll(ranks_per_node=1),
)
MEMBERS = (  # branches last: they replace methods of modules, for good
    NoActivationCheckpointing(),
    CheckpointBlocks(),
    CheckpointCheapOperations(),
    CheckpointBranches(branches=("mixer", "moe")),
)
OBJECTIVE = Objective(LossCategories(LABELS), precision=Float32())
PLANS = [
    ParallelConfig(plan=ParallelPlan(data=RANKS, expert=RANKS, zero=zero), dispatch=dispatch)
    for dispatch, zero in (*product(DISPATCHES, (0, 3)), *product(DISPATCHES[:1], (1, 2)))
]
# a GRU cell changes the results of its products in place
MIXTURE = MoE(experts=4, select=TopK(k=2), cross_layer=RecurrentRouting(width=6))


def _differing(parallel: ParallelConfig) -> Iterator[str]:
    """Yield the members whose gradients differ from those without checkpointing, in this plan."""
    torch.manual_seed(0)
    config, world = tiny_model_config(moe=MIXTURE, layers=2), ProcessGroupWorld()
    model = Transformer(config.replace(encoder=config.encoder.replace(layers=0)))
    whole = parallelize(model, parallel=parallel, world=world)
    expected: list[Tensor] = []
    for member in MEMBERS:
        member.apply(model)
        model.zero_grad()
        batches = [random_batch(2, seed=world.rank)]
        OBJECTIVE.forward_backward(whole, batches=batches)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        expected = expected or found
        if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
            yield f"{parallel.dispatch!r}, zero={parallel.plan.zero}, {member!r}"


def test_checkpointed_activations_give_the_same_gradients() -> None:
    def wrong() -> list[str]:
        return [name for plan in PLANS for name in _differing(plan)]

    assert run_on_ranks(RANKS, wrong) == [[]] * RANKS
