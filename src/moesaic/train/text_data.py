"""Text data: a corpus, the tokenizer trained on it, the mixture of tasks, and the batches."""

from collections.abc import Callable, Iterator

import numpy as np

from moesaic.checkpoint.model_card import DataSource
from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import DataError, UserError
from moesaic.corpus.languages import resolve_language
from moesaic.data import imported_tokenizer as imported_tokenizer  # registers a TokenizerSource
from moesaic.data import preferences as preferences  # registers a Task
from moesaic.data import train_tokenizer as train_tokenizer  # registers a TokenizerSource
from moesaic.data.collators import DecoderOnlyCollator, EncoderDecoderCollator
from moesaic.data.loader import LoaderConfig
from moesaic.data.mixture import MixtureConfig
from moesaic.data.tokenizer_source import TokenizerSource
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.nn.positional_encoding import LearnedPositions
from moesaic.train.corpus_source import CorpusSource
from moesaic.train.find_corpus import open_run_corpus
from moesaic.train.prepare_data import PreparedText, prepare_data
from moesaic.train.training_data import Preparation, TrainingData


class TextData(TrainingData):
    """A corpus in some of its languages, read with a tokenizer.

    ``languages`` accepts any spelling (``de``, ``German``, ``deu_Latn``); empty means all languages
    of the corpus. A micro-batch has ``loader.batch_tokens`` tokens over all ranks together.
    """

    corpus: CorpusSource
    languages: tuple[str, ...] = ()
    tokenizer: TokenizerSource
    mixture: MixtureConfig
    loader: LoaderConfig

    def task_names(self) -> tuple[str, ...]:
        return tuple(weighted.task.name for weighted in self.mixture.tasks)

    def batch_dims(self, model: ModelConfig) -> BatchDims:
        """Return a full micro-batch of texts of half the maximum length."""
        source = max(1, self.loader.max_source // 2) if model.encoder.layers else 0
        target = max(1, self.loader.max_target // 2)
        rows = max(1, self.loader.batch_tokens // (source + target))
        return BatchDims(rows=rows, source=source, target=target)

    def max_batch_tokens(self) -> int:
        return self.loader.batch_tokens

    def prepare(self, place: Preparation) -> PreparedText:
        """Build or open the corpus, then the run directory's tokenizer, then the cached shards.

        Rank 0 does the work and the others wait, so all ranks need the same file system.
        Collective. Raises DataError or ConfigError.
        """
        made = prepare_data(
            place, corpus=self.corpus, languages=self.languages, tokenizer=self.tokenizer
        )
        return PreparedText(made, self.mixture, self.loader)

    def problems(self, model: ModelConfig) -> Iterator[str]:
        for rule in _RULES:
            yield from rule(self, model)

    def shrink(self, *, vocab_size: int) -> "TextData":
        return self.replace(tokenizer=self.tokenizer.shrink(vocab_size))

    def sources(self, run_dir: RunDir) -> list[DataSource]:
        sources = open_run_corpus(self.corpus, run_dir=run_dir).manifest["sources"]
        return [
            DataSource(name, about["licence"], about["pairs"] + about["texts"])
            for name, about in sources.items()
        ]


def require_text(data: TrainingData, *, what: str) -> TextData:
    """Return the data of a run that is text. Raises UserError, which names ``what`` needs it."""
    if isinstance(data, TextData):
        return data
    raise UserError(
        f"{what} needs a run on text: this one has data={type(data).__name__}, expected TextData"
    )


def _rows_for_every_id(data: TextData, model: ModelConfig) -> Iterator[str]:
    size, tokenizer = model.vocab_size, data.tokenizer.size()
    if tokenizer is not None and size < tokenizer:
        yield (
            f"model.vocab_size={size}: data.tokenizer.vocab_size={tokenizer}, and every id needs a "
            "row of the embedding; further rows are never generated"
        )


def _known_languages(data: TextData, model: ModelConfig) -> Iterator[str]:
    del model
    found: dict[str, str] = {}
    for index, text in enumerate(data.languages):
        try:
            code = resolve_language(text).code
        except DataError as error:
            yield f"data.languages.{index}: {error}"
            continue
        if code in found:
            yield f'data.languages.{index}: "{text}" and "{found[code]}" are both {code}'
        found[code] = text


def _collator_fits_the_model(data: TextData, model: ModelConfig) -> Iterator[str]:
    layers, collator = model.encoder.layers, data.loader.collator
    if isinstance(collator, EncoderDecoderCollator) and not layers:
        yield (
            "data.loader.collator=EncoderDecoderCollator needs an encoder, but "
            "model.encoder.layers=0: give it layers, or choose "
            "data.loader.collator=DecoderOnlyCollator"
        )
    if isinstance(collator, DecoderOnlyCollator) and layers:
        yield (
            f"data.loader.collator=DecoderOnlyCollator leaves model.encoder.layers={layers} "
            "without input: set them to 0, or choose data.loader.collator=EncoderDecoderCollator"
        )


def _packing_fits_the_collator(data: TextData, model: ModelConfig) -> Iterator[str]:
    del model
    none = np.zeros(0, dtype=np.int64)
    for index, weighted in enumerate(data.mixture.tasks):
        packed = weighted.task.pieces(none, stream=none, window=1) is not None
        if packed and not isinstance(data.loader.collator, DecoderOnlyCollator):
            yield (
                f"data.mixture.tasks.{index}.task.packing joins documents for a decoder-only "
                "model: choose data.loader.collator=DecoderOnlyCollator, or packing=WholeTexts"
            )


def _lengths_fit_the_positions(data: TextData, model: ModelConfig) -> Iterator[str]:
    if not isinstance(model.position, LearnedPositions):
        return
    positions = model.position.max_length
    lengths = {"max_source": data.loader.max_source, "max_target": data.loader.max_target}
    for side, longest in lengths.items():
        if longest > positions:
            yield (
                f"data.loader.{side}={longest} is longer than the position table "
                f"(model.position.max_length={positions}): shorten the one or lengthen the other"
            )


def _longest_row_fits_a_batch(data: TextData, model: ModelConfig) -> Iterator[str]:
    del model
    loader = data.loader
    source = 0 if isinstance(loader.collator, DecoderOnlyCollator) else loader.max_source
    if loader.batch_tokens < source + loader.max_target:
        yield (
            f"data.loader.batch_tokens={loader.batch_tokens} cannot hold one row of "
            f"max_source={loader.max_source} and max_target={loader.max_target}: at least "
            f"{source + loader.max_target}"
        )


def _batches_can_be_filled(data: TextData, model: ModelConfig) -> Iterator[str]:
    del model
    loader = data.loader
    most = loader.bucket_window * (loader.max_source + loader.max_target)
    if loader.batch_tokens > most:
        yield (
            f"data.loader.batch_tokens={loader.batch_tokens} is more than bucket_window="
            f"{loader.bucket_window} rows of at most max_source={loader.max_source} and "
            f"max_target={loader.max_target} tokens can fill: at most {most}"
        )


_RULES: tuple[Callable[[TextData, ModelConfig], Iterator[str]], ...] = (
    _rows_for_every_id,
    _known_languages,
    _collator_fits_the_model,
    _packing_fits_the_collator,
    _lengths_fit_the_positions,
    _longest_row_fits_a_batch,
    _batches_can_be_filled,
)
