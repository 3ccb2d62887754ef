"""Shards: a run's state where no rank holds all of it, and the way back from any other layout.

Names and shapes are those of the whole model, so a checkpoint of one plan is a checkpoint of all.
"""

from collections.abc import Iterable
from pathlib import Path

from moesaic.checkpoint.block_index import read_index
from moesaic.checkpoint.checkpoint_directory import read_manifest
from moesaic.checkpoint.full_checkpoint import read_snapshot
from moesaic.checkpoint.sharded_checkpoint import load_sharded
from moesaic.checkpoint.snapshot import Snapshot, TensorOrShard
from moesaic.distributed.world import World
from moesaic.model.weights import export_weights
from moesaic.optim.named_optimizer import NamedOptimizer, export_state
from moesaic.parallel.parallel_model import ParallelModel

SHARDED_FILES = ("model", "optimizer")  # the files that no rank holds all of


def local_shards(
    parallel_model: ParallelModel, optimizer: NamedOptimizer
) -> dict[str, dict[str, TensorOrShard]]:
    """Return what this rank holds of the weights and of the optimizer's state, as live memory."""
    weights, names = export_weights(parallel_model.model), set(parallel_model.sharding_plan)
    model: dict[str, TensorOrShard] = {
        name: parallel_model.shard_of(name, tensor) if name in names else tensor
        for name, tensor in weights.items()
    }
    state: dict[str, TensorOrShard] = {}
    for name, tensor in export_state(optimizer).items():
        parameter = name.partition("/")[2]
        state[name] = parallel_model.shard_of(parameter, tensor) if tensor.dim() else tensor
    return {"model": model, "optimizer": state}


def restore_shards(
    path: Path, *, parallel_model: ParallelModel, optimizer: NamedOptimizer, world: World
) -> Snapshot:
    """Fill weights and optimizer from a checkpoint of any layout; return the rest of it.

    Collective. Raises CheckpointError as ``load_sharded`` does.
    """
    index = read_index(path, manifest=read_manifest(path))
    _allocate_optimizer_state(
        optimizer, stepped={n.partition("/")[2] for n in index.files.get("optimizer", {})}
    )
    load_sharded(path, into=local_shards(parallel_model, optimizer), world=world)
    return read_snapshot(path, only=[file for file in index.files if file not in SHARDED_FILES])


def _allocate_optimizer_state(optimizer: NamedOptimizer, *, stepped: Iterable[str]) -> None:
    """Make room for the state of every parameter that had any."""
    known = set(stepped)
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in known:
                optimizer.ensure_state(parameter, rule=group["rule"])
