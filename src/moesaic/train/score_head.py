"""Scoring a run of any head: its loss and metrics on a held-out split of its own data."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import require_plugins, require_unchanged
from moesaic.core.errors import DataError
from moesaic.data.batch import Batch
from moesaic.data.batch_stream import DataReplica
from moesaic.distributed.world import SingleProcess
from moesaic.evaluate.head_scores import HeadScores, RowSums, score_rows
from moesaic.model.transformer import Transformer
from moesaic.parallel.trained_weights import find_weights
from moesaic.train.run import Run
from moesaic.train.running_metrics import LossCategories
from moesaic.train.training_data import BatchLoader, Preparation


def score_head(
    run: Run, path: Path, *, split: str, limit: int | None = None, resamples: int = 1000
) -> HeadScores:
    """Return the scores of a finished run on ``split``, at most ``limit`` rows of each stream.

    Raises CheckpointError or DataError.
    """
    run_dir = RunDir.open(path)
    require_plugins(run_dir)
    require_unchanged(run_dir)
    model = find_weights(run_dir, config=run.to_dict()).load(run.model)
    prepared = run.data.prepare(Preparation(run_dir, SingleProcess(), [].append))
    loader = prepared.make_loader(DataReplica(), seed=run.seed)
    try:
        parts = list(_row_sums(model.eval(), loader, split=split, limit=limit))
    finally:
        loader.close()
    if not parts:
        raise DataError(f"{path}: its data has no {split} rows to score")
    joined = RowSums(
        np.concatenate([part.values for part in parts], 1),
        np.concatenate([part.counts for part in parts]),
        {name: np.concatenate([part.labels[name] for part in parts]) for name in parts[0].labels},
    )
    names = ("loss", *run.model.head.metric_names)
    return score_rows(joined, names=names, split=split, resamples=resamples)


@torch.no_grad()
def _row_sums(
    model: Transformer, loader: BatchLoader, *, split: str, limit: int | None
) -> Iterator[RowSums]:
    categories = LossCategories.of(loader.labels)
    for given in loader.held_out_batches(split, rows=limit):
        batch = model.config.head.training_batch(given)
        output = model(batch)
        values = model.loss(output).values.double()
        sums = values.new_zeros(len(values), batch.rows).index_add_(1, output.row, values)
        counts = torch.bincount(output.row, minlength=batch.rows)
        kept = (counts > 0).numpy()
        yield RowSums(
            sums.numpy()[:, kept],
            counts.numpy()[kept],
            {group: _names(batch, categories, group)[kept] for group in categories.groups},
        )


def _names(batch: Batch, categories: LossCategories, group: str) -> np.ndarray:
    """Return the name of each row's label in a group; empty for a row without."""
    names = np.array(["", *categories.labels[group]])
    return names[batch.groups[group].clamp(min=-1).numpy() + 1]
