"""Sharded training state: this rank's shards of weights and optimizer state, saved and restored.

Names and global shapes are those of the unsharded model, so a checkpoint of one parallel plan can
be loaded under any other.
"""

from pathlib import Path

from moesaic.checkpoint.block_index import read_index
from moesaic.checkpoint.full_checkpoint import read_snapshot
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.sharded_checkpoint import load_verified
from moesaic.checkpoint.snapshot import Snapshot, TensorOrShard
from moesaic.distributed.world import World
from moesaic.optim.named_optimizer import (
    NamedOptimizer,
    export_masters,
    export_state,
    round_masters,
)
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.weight_start import weight_shards

SHARDED_FILES = ("model", "optimizer")  # their tensors are distributed over ranks


def local_shards(
    parallel_model: ParallelModel, optimizer: NamedOptimizer
) -> dict[str, dict[str, TensorOrShard]]:
    """Return this rank's shards of weights and optimizer state, without copying."""
    weights = weight_shards(parallel_model) | parallel_model.shards(export_masters(optimizer))
    state: dict[str, TensorOrShard] = {}
    for name, tensor in export_state(optimizer).items():
        parameter = name.partition("/")[2]
        state[name] = parallel_model.shard_of(parameter, tensor) if tensor.dim() else tensor
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
                optimizer.ensure_state(parameter, rule=group["rule"])
    load_verified(path, into=local_shards(parallel_model, optimizer), world=world)
    round_masters(optimizer)
    return read_snapshot(path, only=[file for file in index.files if file not in SHARDED_FILES])
