"""Weight start: give a rank's shards memory, and the values that they have at step 0.

``parallelize`` cuts a model that is on the meta device; a rank then allocates its shards only, so
that no rank ever holds more of a model than its plan says.
"""

import torch

from moesaic.checkpoint.snapshot import Shard, as_shard
from moesaic.model.weights import export_weights
from moesaic.nn.initializer import (
    Allocate,
    allocate_parameters,
    draw_block,
    parameter_key,
)
from moesaic.parallel.parallel_model import ParallelModel


def allocate_shards(parallel_model: ParallelModel, *, allocate: Allocate | None = None) -> None:
    """Give memory to this rank's parameters; of what ZeRO shards, to the rank's shard only.

    ``allocate`` returns the memory of a parameter's part by name, shape and dtype; by default on
    the device, and on the host what the plan offloads.
    """
    device = parallel_model.mesh.device
    allocate_parameters(
        parallel_model.model, allocate=allocate or _by_plan(parallel_model), device=device
    )


def _by_plan(parallel_model: ParallelModel) -> Allocate:
    mesh = parallel_model.mesh
    sync = parallel_model.gradient_sync.items() if mesh.plan.offload else ()
    offloaded = {name for name, each in sync if each.zero_axes}

    def allocate(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        device = torch.device("cpu") if name in offloaded else mesh.device
        return torch.empty(shape, dtype=dtype, device=device)

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
