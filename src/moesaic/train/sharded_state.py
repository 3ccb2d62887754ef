"""Sharded training state: this rank's shards of weights and optimizer state, saved and restored.

Names and global shapes are those of the unsharded model, so a checkpoint of one parallel plan can
be loaded under any other.
"""

from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path

from moesaic.checkpoint.block_index import StoredTensor, read_index
from moesaic.checkpoint.full_checkpoint import read_snapshot
from moesaic.checkpoint.manifest import read_manifest
from moesaic.checkpoint.sharded_checkpoint import load_verified
from moesaic.checkpoint.snapshot import Snapshot, TensorOrShard, as_shard
from moesaic.core.errors import CheckpointError
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
    blocks = state_blocks(optimizer)
    state = local_shards(parallel_model, live_state(optimizer), blocks=blocks)
    try:
        load_verified(path, into=state, world=world)
    except CheckpointError as error:
        stored = index.files.get("optimizer", {})
        way_out = _way_out(stored, expected=state["optimizer"], scales=blocks)
        raise CheckpointError(f"{error}{way_out}") from error
    round_masters(optimizer)
    return read_snapshot(path, only=[file for file in index.files if file not in SHARDED_FILES])


def _way_out(
    stored: Mapping[str, StoredTensor],
    *,
    expected: Mapping[str, TensorOrShard],
    scales: Container[str],
) -> str:
    """Return what to set if a checkpoint has moments in another form than this run; else ''."""
    pairs = [(n, stored[n], as_shard(tensor)) for n, tensor in expected.items() if n in stored]
    if any(found.shape != shard.shape for name, found, shard in pairs if name not in scales):
        return ""  # of another model
    for name, found, shard in pairs:
        is_coded = not found.dtype.is_floating_point
        if is_coded == shard.dtype.is_floating_point or found.shape != shard.shape:
            of = "EightBitStates, with the block" if is_coded or name in scales else "Float32States"
            return f": set optimizer.states (with Muon optimizer.adamw.states) to {of} of its run"
    return ""
