"""Warm start: the weights that a run has at step 0, drawn at random or taken from another run.

Only weights (with the state of routing rules) and the tokenizer are taken. The optimizer, the
schedule, the data and the counters start anew.
"""

from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from moesaic.checkpoint.full_checkpoint import read_weights
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.trained_directions import read_trained_directions
from moesaic.core.config import Choice
from moesaic.core.errors import CheckpointError
from moesaic.data.vocabulary_file import copy_tokenizer
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import Transformer
from moesaic.model.weights import restore_weights


class InitialWeights(Choice):
    """Family: the weights at step 0, and the tokenizer that belongs to them.

    ``way_out`` says what to do about a language that the tokenizer has no tag for.
    """

    way_out: ClassVar[str] = "remove it to train another"

    def prepare(self, run_dir: RunDir, *, model: ModelConfig) -> str | None:
        """Check that the weights fit, before any work, and take what belongs to them.

        That is the tokenizer, and the record of the directions that were trained. Returns a note.
        On rank 0. Raises CheckpointError.
        """
        raise NotImplementedError

    def load_into(self, model: nn.Module) -> None:
        """Set the weights of a whole model, which has been drawn at random."""
        raise NotImplementedError


class RandomWeights(InitialWeights):
    """Weights drawn at random (``model.init``)."""

    def prepare(self, run_dir: RunDir, *, model: ModelConfig) -> str | None:
        del model
        run_dir.directions.unlink(missing_ok=True)  # of an earlier start

    def load_into(self, model: nn.Module) -> None:
        del model


class WeightsOfRun(InitialWeights):
    """The final weights of the run directory ``path``, with its tokenizer.

    The vocabulary stays as it is, so the languages of the data must be among those of the run.
    """

    way_out: ClassVar[str] = (
        "a warm start keeps the vocabulary of its run: choose among the languages of that "
        "(--set data.languages=[...]), or train the new ones without --init"
    )
    path: str

    def prepare(self, run_dir: RunDir, *, model: ModelConfig) -> str:
        source = self._open()
        with torch.device("meta"):
            whole = Transformer(model)
        self.load_into(whole)
        earlier = read_trained_directions(source.directions)
        if source.tokenizer.is_file():
            copy_tokenizer(source.tokenizer, to=run_dir.tokenizer)
        run_dir.directions.unlink(missing_ok=True)
        if earlier is not None:
            earlier.write(run_dir.directions)
        return f"starting from the weights and the tokenizer of {self.path}"

    def load_into(self, model: nn.Module) -> None:
        try:
            restore_weights(model, read_weights(self._open().model))
        except CheckpointError as error:
            raise CheckpointError(
                f"--init {self.path}: {error}. A warm start needs the model of that run: leave out "
                "the recipe, or change only what has no weights"
            ) from error

    def _open(self) -> RunDir:
        source = RunDir.open(Path(self.path))
        source.require_model()
        return source
