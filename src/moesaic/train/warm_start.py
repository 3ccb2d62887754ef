"""Warm start: the weights that a run has at step 0, drawn at random or taken from another run.

Only weights (with the state of routing rules) and the tokenizer are taken. The optimizer, the
schedule, the data and the counters start anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import hash_weights
from moesaic.checkpoint.stored_weights import StoredWeights, open_weights
from moesaic.checkpoint.trained_directions import read_trained_directions
from moesaic.core.config import Choice
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.core.files import copy_files
from moesaic.corpus.languages import resolve_language
from moesaic.data.tokenizer import Tokenizer
from moesaic.data.vocabulary_file import copy_tokenizer
from moesaic.model.config import ModelConfig
from moesaic.model.inputs import TokenIds
from moesaic.model.transformer import Transformer
from moesaic.model.weights import require_fitting_weights
from moesaic.nn.adapter import is_of_adapter
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.trainable_parameters import TrainableParameters
from moesaic.parallel.weight_start import draw_shards, weight_shards
from moesaic.train.new_rows import MeanOfRows, NewRows, fill_grown_table, grown_tables

_IMPORTED_CONFIGS = ("config.json", "generation_config.json")


class InitialWeights(Choice):
    """Family: the weights at step 0, and the tokenizer that belongs to them.

    ``way_out`` says what to do about a language that the tokenizer has no tag for.
    """

    way_out: ClassVar[str] = "remove it to train another"

    def prepare(
        self, run_dir: RunDir, *, model: ModelConfig, trainable: TrainableParameters
    ) -> str | None:
        """Check that the weights fit, before any work, and take what belongs to them.

        That is the tokenizer, and the record of the directions that were trained. Returns a note.
        On rank 0. Raises CheckpointError; ConfigError for new rows that would never be saved.
        """
        raise NotImplementedError

    def fill(self, parallel_model: ParallelModel, *, seed: int) -> None:
        """Give this rank's parameters, which have memory, their values at step 0."""
        raise NotImplementedError

    def pinned(self) -> Self:
        """Return these weights with the hash of their file, for what is trained beside them.

        Reads the whole file. Raises CheckpointError if they have another hash already.
        """
        return self


class RandomWeights(InitialWeights):
    """Weights drawn at random (``model.init``)."""

    def prepare(
        self, run_dir: RunDir, *, model: ModelConfig, trainable: TrainableParameters
    ) -> None:
        del model, trainable
        run_dir.directions.unlink(missing_ok=True)  # of an earlier start

    def fill(self, parallel_model: ParallelModel, *, seed: int) -> None:
        draw_shards(parallel_model, seed=seed)


class WeightsOfRun(InitialWeights):
    """The final weights of the run directory ``path``, with its tokenizer.

    ``added_languages`` get a tag at the end of the vocabulary; ``model.vocab_size`` (and that of
    the tokenizer, where the config has it) must have room for them. ``new_rows`` are the first
    values of all further rows. Other languages of the data must be among those of the run.
    ``sha256`` is the hash of the weights where adapters are trained beside them.
    """

    way_out: ClassVar[str] = (
        "a warm start keeps the vocabulary of its run: choose among the languages of that "
        "(--set data.languages=[...]), or add tags (initial_weights.added_languages=[...])"
    )
    path: str
    sha256: str | None = None
    added_languages: tuple[str, ...] = ()
    new_rows: NewRows = MeanOfRows()

    def pinned(self) -> Self:
        return self.replace(sha256=hash_weights(self.open(), expected=self.sha256))

    def prepare(
        self, run_dir: RunDir, *, model: ModelConfig, trainable: TrainableParameters
    ) -> str:
        source = self.open()
        if isinstance(model.input, TokenIds):
            source.require_text_model()
        with self._open_weights(source) as stored:
            made = Transformer.without_values(model)
            expected = {name: tuple(p.shape) for name, p in made.named_parameters()}
            grown = grown_tables(expected, stored.shapes)
            shapes = stored.shapes | {name: expected[name] for name in grown}
            require_fitting_weights(made, shapes)
            if grown and trainable.keeps_base:
                kind = type(trainable).__name__
                raise ConfigError(
                    [
                        f"model.vocab_size={model.vocab_size}: {source.path} has "
                        f"{stored.shapes[grown[0]][0]} rows in {grown[0]}, and new rows are "
                        f"neither trained nor saved beside an adapter (trainable={kind}): train "
                        "all parameters first, or keep the vocab_size of that run"
                    ]
                )
        earlier = read_trained_directions(source.directions)
        if source.tokenizer.is_file():
            copy_tokenizer(source.tokenizer, to=run_dir.tokenizer)
            if self.added_languages:
                codes = [resolve_language(text).code for text in self.added_languages]
                Tokenizer.load(run_dir.tokenizer).with_languages(codes).save(run_dir.tokenizer)
        if source.imported.is_dir():  # an export writes it again, but for a tokenizer that grew
            kept = _IMPORTED_CONFIGS if self.added_languages else ("*",)
            copy_files(
                (f for name in kept for f in source.imported.glob(name)), to=run_dir.imported
            )
        run_dir.directions.unlink(missing_ok=True)
        if earlier is not None:
            earlier.write(run_dir.directions)
        return f"starting from the weights and the tokenizer of {self.path}"

    def fill(self, parallel_model: ParallelModel, *, seed: int) -> None:
        source = self.open()
        with self._open_weights(source) as stored:
            shards = {
                name: shard
                for name, shard in weight_shards(parallel_model).items()
                if not is_of_adapter(name)
            }
            tables = {name: shard.shape for name, shard in shards.items()}
            for name in grown_tables(tables, stored.shapes):
                fill_grown_table(
                    shards.pop(name),
                    name,
                    stored=stored,
                    row=self.new_rows.row(stored, name, tokenizer=source.tokenizer),
                    distribution=parallel_model.model.distributions[name],
                    seed=seed,
                )
            stored.read_into(shards)
        draw_shards(parallel_model, seed=seed, includes=is_of_adapter)

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

    def open(self) -> RunDir:
        """Return the run directory. Raises CheckpointError if it has no weights."""
        source = RunDir.open(Path(self.path))
        source.require_whole_weights()
        return source
