"""State blocks: whether a plan cuts the rows of parameters between the blocks of their states.

States in 8 bits have one number for a block of values of a row. A rank that had a part of a block
would quantize it to other values, so losses would depend on the plan.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan, RankGrid
from moesaic.model.transformer import Transformer
from moesaic.optim.optimizer import Optimizer
from moesaic.parallel.sharding_plan import Placement, make_sharding_plan
from moesaic.parallel.trainable_parameters import TrainableParameters


def check_state_blocks(
    model: Transformer,
    *,
    optimizer: Optimizer,
    trainable: TrainableParameters,
    plan: ParallelPlan,
) -> None:
    """Raise ConfigError if a plan cuts a row of a trained parameter within a block.

    ``model`` is whole; its parameters may have no memory.
    """
    if max(plan.tensor, plan.expert_tensor) == 1:
        return
    kinds = model.parameter_kinds()
    for name, placement in make_sharding_plan(model).items():
        parameter = nn.Parameter(torch.empty(placement.shape, device="meta"))
        rule = optimizer.param_group(parameter, kind=kinds[name])["rule"]
        block = max(rule.state_blocks.values(), default=1)
        if block == 1 or not trainable.includes(name):
            continue
        common = math.gcd(*_row_cuts(placement, plan=plan))
        if common % block:
            raise ConfigError([_sentence(name, placement, block=block, common=common, plan=plan)])


def _row_cuts(placement: Placement, *, plan: ParallelPlan) -> Iterator[int]:
    """Yield where slices of a row begin and end, but for the ends of the row itself."""
    grid, row = RankGrid(plan.axes(num_experts=placement.num_experts)), placement.shape[-1]
    for sharded in placement.sharded_dims:
        ranks = grid.axes[sharded.axis]
        if sharded.dim == len(placement.shape) - 1 and ranks > 1:
            spans = (span for index in range(ranks) for span in sharded.spans(index, ranks))
            ends = {end for start, length in spans for end in (start, start + length)}
            yield from ends - {row}


def _sentence(
    name: str, placement: Placement, *, block: int, common: int, plan: ParallelPlan
) -> str:
    way_out = f"set block to a divisor of {common}" if common > 1 else "leave rows whole"
    degrees = f"parallel.plan.tensor={plan.tensor}, expert_tensor={plan.expert_tensor}"
    return (
        f"optimizer.states=EightBitStates(block={block}) with {degrees}: slices of the "
        f"{placement.shape[-1]} values of a row of {name} begin at multiples of {common}, within "
        f"blocks: {way_out}, choose a smaller degree, or Float32States"
    )
