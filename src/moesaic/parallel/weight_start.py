"""Weight start: give a rank's shards memory, and the values that they have at step 0.

``parallelize`` cuts a model that is on the meta device; a rank then allocates its shards only, so
that no rank ever holds more of a model than its plan says.
"""

import torch

from moesaic.checkpoint.snapshot import Shard, as_shard
from moesaic.model.weights import export_weights
from moesaic.nn.initializer import (
    Allocate,
    allocate_on,
    allocate_parameters,
    draw_block,
    parameter_key,
)
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.precision import set_gradient_dtype


def allocate_shards(parallel_model: ParallelModel, *, allocate: Allocate | None = None) -> None:
    """Give memory to this rank's parameters; of what ZeRO shards, to the rank's shard only.

    ``allocate`` returns the memory of a parameter's part by name, shape and dtype; by default on
    the device, and on its tier where the plan streams the parameter.
    """
    device, stream = parallel_model.mesh.device, parallel_model.parameter_stream
    allocate_parameters(
        parallel_model.model, allocate=allocate or _by_plan(parallel_model), device=device
    )
    set_gradient_dtype(parallel_model.model, parallel_model.precision)
    if stream is not None:
        stream.move_to_tier()


def _by_plan(parallel_model: ParallelModel) -> Allocate:
    stream = parallel_model.parameter_stream
    on_device = allocate_on(parallel_model.mesh.device)
    if stream is None:
        return on_device
    streamed = frozenset(stream.names)

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return (stream.memory if name in streamed else on_device)(name, shape, dtype)

    return allocate


def draw_shards(parallel_model: ParallelModel, *, seed: int) -> None:
    """Fill this rank's parameters with random values: the same weights under every plan."""
    distributions = parallel_model.model.distributions
    for name, shard in parallel_model.shards().items():
        key = parameter_key(seed, name)
        for block in shard.blocks:
            draw_block(
                block.data, distributions[name], key=key, offset=block.offset, shape=shard.shape
            )


def weight_shards(parallel_model: ParallelModel) -> dict[str, Shard]:
    """Return this rank's shards of all weights, saved buffers included, without copying."""
    sharded = parallel_model.sharding_plan
    return {
        name: parallel_model.shard_of(name, tensor) if name in sharded else as_shard(tensor)
        for name, tensor in export_weights(parallel_model.model).items()
    }
