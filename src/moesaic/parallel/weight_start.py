"""Weight start: give a rank's shards memory, and the values that they have at step 0.

``parallelize`` cuts a model that is on the meta device and allocates a rank's shards only, so that
no rank ever holds more of a model than its plan says. They are then drawn, or read from a file.
"""

from collections.abc import Callable

import torch

from moesaic.checkpoint.snapshot import Shard, as_shard
from moesaic.core.shapes import Tensor
from moesaic.nn.initializer import Allocate, allocate_on, draw_block, parameter_key
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parameter_streaming import ParameterStream


def allocate_by_plan(device: torch.device, *, stream: ParameterStream | None) -> Allocate:
    """Return the allocation on ``device``, or on its tier where ``stream`` has the parameter."""
    on_device = allocate_on(device)
    if stream is None:
        return on_device
    streamed = frozenset(stream.names)

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return (stream.memory if name in streamed else on_device)(name, shape, dtype)

    return allocate


def draw_shards(
    parallel_model: ParallelModel,
    *,
    seed: int,
    includes: Callable[[str], bool] = lambda _name: True,
) -> None:
    """Fill this rank's parameters with random values: the same weights under every plan.

    ``includes`` chooses among them by name.
    """
    distributions = parallel_model.model.distributions
    for name, shard in parallel_model.shards().items():
        if not includes(name):
            continue
        key = parameter_key(seed, name)
        for block in shard.blocks:
            draw_block(
                block.data, distributions[name], key=key, offset=block.offset, shape=shard.shape
            )


def weight_shards(parallel_model: ParallelModel) -> dict[str, Shard]:
    """Return this rank's shards of what is saved: weights, saved buffers included, not copied."""
    sharded = parallel_model.sharding_plan
    return {
        name: parallel_model.shard_of(name, tensor) if name in sharded else as_shard(tensor)
        for name, tensor in parallel_model.saved_weights().items()
    }
