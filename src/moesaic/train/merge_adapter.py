"""Merge: the adapter of a run and the weights that it was trained beside become one model.

The other run is only read: the weights without the adapter stay as they are there.
"""

import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import rewrite_run_record, weights_metadata
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.checkpoint.stored_weights import open_weights
from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.parallel.adapter_choice import AdapterChoice
from moesaic.train.run import Run
from moesaic.train.warm_start import WeightsOfRun


def merge_adapter(run_dir: RunDir) -> int:
    """Write ``model.safetensors`` of a run that has an adapter; return the number of its matrices.

    One tensor is in memory at a time, beside the adapter. Raises CheckpointError: no adapter, or
    other weights than those that it was trained beside.
    """
    run, merged = Run.from_yaml(run_dir.config.read_text()), 0
    choice, start = run.trainable, run.initial_weights
    if not isinstance(choice, AdapterChoice) or not isinstance(start, WeightsOfRun):
        kind = type(choice).__name__
        raise CheckpointError(
            f"{run_dir.path}: trainable is {kind}, so its weights need no merging; expected a run "
            "of adapters (trainable=LoRA(...))"
        )
    if not run_dir.adapter.is_file():
        raise CheckpointError(
            f"{run_dir.adapter}: missing; training writes it when it ends: moesaic train --resume "
            f"{run_dir.path}"
        )
    base, adapter = start.pinned().open(), read_tensors(run_dir.adapter)
    with open_weights(base.model) as stored:

        def read(name: str) -> Tensor:
            nonlocal merged
            if name in adapter:  # the state of a routing rule
                return adapter[name]
            weight = stored.whole(name)
            value = choice.merged(weight, name=name, adapter=adapter)
            merged += value is not weight
            return value.to(weight.dtype)

        shapes = {
            name: torch.empty(each.shape, dtype=each.dtype, device="meta")
            for name, each in stored.tensors.items()
        }
        metadata = weights_metadata(run_dir, model=run.model.to_dict())
        write_tensors(run_dir.model, tensors=shapes, read=read, metadata=metadata)
    rewrite_run_record(run_dir, config=run.to_dict())
    return merged
