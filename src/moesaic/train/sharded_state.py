"""Sharded training state: this rank's shards of weights and optimizer state, saved and restored.

Names and global shapes are those of the unsharded model, so a checkpoint of one parallel plan can
be loaded under any other.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from moesaic.checkpoint.block_index import read_index
from moesaic.checkpoint.full_checkpoint import read_snapshot
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.sharded_checkpoint import load_verified
from moesaic.checkpoint.snapshot import Snapshot, TensorOrShard
from moesaic.core.shapes import Tensor
from moesaic.distributed.world import World
from moesaic.optim.named_optimizer import NamedOptimizer
from moesaic.optim.optimizer_state import (
    live_state,
    masters_of,
    round_masters,
    state_blocks,
    without_masters,
)
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.weight_start import weight_shards

SHARDED_FILES = ("model", "optimizer")  # their tensors are distributed over ranks


def local_shards(
    parallel_model: ParallelModel,
    optimizer_state: Mapping[str, Tensor],
    *,
    blocks: Mapping[str, int],
) -> dict[str, dict[str, TensorOrShard]]:
    """Return this rank's shards of weights and of all optimizer state, without copying.

    ``blocks`` are those of ``state_blocks``.
    """
    weights = weight_shards(parallel_model) | parallel_model.shards(masters_of(optimizer_state))
    state: dict[str, TensorOrShard] = {}
    for name, tensor in without_masters(optimizer_state).items():
        parameter = name.partition("/")[2]
        shard = partial(parallel_model.shard_of, parameter, block=blocks.get(name, 1))
        state[name] = shard(tensor) if tensor.dim() else tensor
    return {"model": dict(weights), "optimizer": state}


def restore_shards(
    path: Path, *, parallel_model: ParallelModel, optimizer: NamedOptimizer, world: World
) -> Snapshot:
    """Load weights and optimizer state from a checkpoint of any plan; return the remaining files.

    Its files have been hashed. Collective. Raises CheckpointError as ``load_sharded`` does.
    """
    index = read_index(path, manifest=read_manifest(path))
    saved = {name.partition("/")[2] for name in index.files.get("optimizer", {})}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in saved:
                optimizer.ensure_state(name, parameter, rule=group["rule"])
    state = local_shards(parallel_model, live_state(optimizer), blocks=state_blocks(optimizer))
    load_verified(path, into=state, world=world)
    round_masters(optimizer)
    return read_snapshot(path, only=[file for file in index.files if file not in SHARDED_FILES])
