"""Warm start: the weights that a run has at step 0, drawn at random or taken from another run.

Only weights (with the state of routing rules) and the tokenizer are taken. The optimizer, the
schedule, the data and the counters start anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.stored_weights import StoredWeights, open_weights
from moesaic.checkpoint.trained_directions import read_trained_directions
from moesaic.core.config import Choice
from moesaic.core.errors import CheckpointError
from moesaic.data.vocabulary_file import copy_tokenizer
from moesaic.model.config import ModelConfig
from moesaic.model.inputs import TokenIds
from moesaic.model.transformer import Transformer
from moesaic.model.weights import require_fitting_weights
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.weight_start import draw_shards, weight_shards


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

    def fill(self, parallel_model: ParallelModel, *, seed: int) -> None:
        """Give this rank's parameters, which have memory, their values at step 0."""
        raise NotImplementedError


class RandomWeights(InitialWeights):
    """Weights drawn at random (``model.init``)."""

    def prepare(self, run_dir: RunDir, *, model: ModelConfig) -> str | None:
        del model
        run_dir.directions.unlink(missing_ok=True)  # of an earlier start

    def fill(self, parallel_model: ParallelModel, *, seed: int) -> None:
        draw_shards(parallel_model, seed=seed)


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
        if isinstance(model.input, TokenIds):
            source.require_text_model()
        with self._open_weights(source) as stored:
            require_fitting_weights(Transformer.without_values(model), stored.shapes)
        earlier = read_trained_directions(source.directions)
        if source.tokenizer.is_file():
            copy_tokenizer(source.tokenizer, to=run_dir.tokenizer)
        run_dir.directions.unlink(missing_ok=True)
        if earlier is not None:
            earlier.write(run_dir.directions)
        return f"starting from the weights and the tokenizer of {self.path}"

    def fill(self, parallel_model: ParallelModel, *, seed: int) -> None:
        del seed
        with self._open_weights(self._open()) as stored:
            stored.read_into(weight_shards(parallel_model))

    @contextmanager
    def _open_weights(self, source: RunDir) -> Iterator[StoredWeights]:
        try:
            with open_weights(source.model) as stored:
                yield stored
        except CheckpointError as error:
            raise CheckpointError(
                f"--init {self.path}: {error}. A warm start needs the model of that run: leave out "
                "the recipe, or change only what has no weights"
            ) from error

    def _open(self) -> RunDir:
        source = RunDir.open(Path(self.path))
        source.require_weights()
        return source
