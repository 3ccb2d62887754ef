"""Trained weights of a run: a whole model's, or an adapter beside the weights of another run.

An adapter is not merged: the other run's weights are read where the config has them, and the
adapter is added in every forward pass, as in training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import hash_weights
from moesaic.checkpoint.stored_weights import load_transformer, open_weights
from moesaic.core.errors import CheckpointError
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.nn.adapter import is_of_adapter
from moesaic.parallel import low_rank_adaptation as low_rank_adaptation  # registers its members
from moesaic.parallel import sparse_adaptation as sparse_adaptation  # registers its members
from moesaic.parallel.trainable_parameters import AllParameters, TrainableParameters


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """Files or checkpoints that have the weights of one model, and the choice of its adapters.

    A tensor that several have is read from the last.
    """

    paths: tuple[Path, ...]
    trainable: TrainableParameters = field(default_factory=AllParameters)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        shapes = {}
        for path in self.paths:
            with open_weights(path) as stored:
                shapes |= stored.shapes
        return shapes

    def load(self, config: ModelConfig, *, device: str = "cpu") -> Transformer:
        """Return the model, an adapter unmerged. Raises CheckpointError if they do not fit."""
        attach = self.trainable.attach
        return load_transformer(config, *self.paths, device=device, attach=attach)


def find_weights(
    run: RunDir, *, config: Mapping[str, Any], weights: Path | None = None
) -> TrainedWeights:
    """Find what the model of a run is read from; ``weights`` are a checkpoint's, else its own.

    ``config`` is the plain config of the run. The weights that an adapter was trained beside are
    hashed. Raises CheckpointError if they are missing, or others than the config has.
    """
    path = weights or run.weights
    with open_weights(path) as stored:
        if not any(map(is_of_adapter, stored.tensors)):
            return TrainedWeights((path,))
    found = config.get("initial_weights")
    start = found if isinstance(found, Mapping) else {}
    try:
        base = RunDir.open(Path(str(start.get("path"))))
        base.require_whole_weights()
        hash_weights(base, expected=start.get("sha256"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: it has an adapter of the weights of another run (initial_weights in "
            f"{run.config}), which cannot be read: {error}. If that run was moved, "
            f"correct initial_weights.path there, then: moesaic ckpt adopt {run.path}"
        ) from error
    trainable = TrainableParameters.from_dict(config.get("trainable", {}))
    return TrainedWeights((base.model, path), trainable)
