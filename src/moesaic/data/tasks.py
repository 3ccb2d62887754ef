"""Training tasks: translation, denoising, causal language modelling, and translation directions.

A task defines the streams of rows that it reads, and the model's input for their sources. A
subclass of ``Task`` is a new ``kind`` of the config. Letters: B rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.core.errors import DataError, did_you_mean, listed
from moesaic.corpus.languages import ENGLISH
from moesaic.data.document_packing import DocumentPacking, DocumentPieces, WholeTexts
from moesaic.data.numpy_counter_rng import UInt64Array, random_bits
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.text_noise import DeleteTokens, InfillSpans, MaskTokens, ShuffleTokens, TextNoise
from moesaic.data.token_shards import IndexedRows, PairRows, TokenShards
from moesaic.data.vocabulary import Vocabulary

LanguagePair = tuple[str, str]


class StoredPairs(Protocol):
    """What directions are read from: a ``Corpus``, or its ``TokenShards``."""

    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def directions(self) -> Sequence[LanguagePair]: ...


class Directions(Choice):
    """The (source, target) languages of a translation task.

    A pair of the corpus can be used in both directions; two languages can be joined by a third.
    """

    def language_pairs(self, shards: StoredPairs) -> list[LanguagePair]:
        """Return (source, target) codes, in an order that does not depend on the machine."""
        raise NotImplementedError

    def rows(self, shards: TokenShards, pair: LanguagePair, *, split: str) -> PairRows:
        """Return the rows of one of ``language_pairs``."""
        return shards.pair_rows(*pair, split=split)


class FromEnglish(Directions):
    """English to every language that has pairs with it."""

    def language_pairs(self, shards: StoredPairs) -> list[LanguagePair]:
        return [pair for pair in _both_directions(shards.directions) if pair[0] == ENGLISH]


class ToEnglish(Directions):
    """Every language that has pairs with English, to English."""

    def language_pairs(self, shards: StoredPairs) -> list[LanguagePair]:
        return [pair for pair in _both_directions(shards.directions) if pair[1] == ENGLISH]


class StoredDirections(Directions):
    """The directions of the corpus as stored."""

    def language_pairs(self, shards: StoredPairs) -> list[LanguagePair]:
        return sorted(shards.directions)


class BothDirections(Directions):
    """Every direction of the corpus and its reverse."""

    def language_pairs(self, shards: StoredPairs) -> list[LanguagePair]:
        return _both_directions(shards.directions)


class ListedDirections(Directions):
    """The directions listed, e.g. ``["eng_Latn-deu_Latn", "fra_Latn-eng_Latn"]``."""

    pairs: tuple[str, ...] = Field(min_length=1)

    def language_pairs(self, shards: StoredPairs) -> list[LanguagePair]:
        known = {f"{s}-{t}": (s, t) for s, t in _both_directions(shards.directions)}
        for text in self.pairs:
            if text not in known:
                raise DataError(
                    f'"{text}" is not a direction of this corpus: it has {listed(known)}'
                    f"{did_you_mean(text, known)}"
                )
        return [known[text] for text in self.pairs]


class PivotDirections(Directions):
    """Every pair of languages that share texts of ``pivot``, neither of them the pivot.

    The pairs are joined by the shared text and kept in memory, 8 bytes each.
    """

    pivot: str = ENGLISH
    languages: tuple[str, ...] = ()
    """Only between these; empty: all."""

    def language_pairs(self, shards: StoredPairs) -> list[LanguagePair]:
        ends = sorted(t for s, t in _both_directions(shards.directions) if s == self.pivot)
        chosen = [e for e in ends if not self.languages or e in self.languages]
        return [(s, t) for s in chosen for t in chosen if s != t]

    def rows(self, shards: TokenShards, pair: LanguagePair, *, split: str) -> PairRows:
        return shards.pivot_rows(*pair, pivot=self.pivot, split=split)


def _both_directions(directions: Iterable[LanguagePair]) -> list[LanguagePair]:
    return sorted(
        {pair for source, target in directions for pair in ((source, target), (target, source))}
    )


@dataclass(frozen=True, slots=True)
class TaskStream:
    """The rows of one task in one direction, and of one domain: what a mixture draws from."""

    source_language: str
    target_language: str
    rows: IndexedRows
    domain: str = ""

    @property
    def size(self) -> int:
        return self.rows.size


class Task(Choice):
    """A training task. ``name`` is its name in metrics."""

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the vocabulary that the task needs beside the end of a text."""
        return ()

    def streams(
        self, shards: TokenShards, *, languages: Sequence[str], split: str
    ) -> list[TaskStream]:
        """Return the streams among ``languages``, empty ones included."""
        raise NotImplementedError

    def translated_pairs(
        self,
        corpus: StoredPairs,  # noqa: ARG002
        *,
        languages: Sequence[str],  # noqa: ARG002
    ) -> list[LanguagePair]:
        """Return the directions of translation among ``languages``; none if it is another task."""
        return []

    def pieces(
        self,
        length: IntArray,  # noqa: ARG002
        *,
        stream: IntArray,  # noqa: ARG002
        window: int,  # noqa: ARG002
    ) -> DocumentPieces | None:
        """Return how texts become rows (``DocumentPacking.pieces``); None: a row is a text."""
        return None

    def max_source_lengths(self, source: IntArray) -> IntArray:
        """Return an upper bound [B] of the source lengths after ``corrupt_source``."""
        return source

    def corrupt_source(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        """Return the model's input for source ``rows``; ``key[B]`` are random bits of each row."""
        del key, vocabulary
        return rows


class Translation(Task):
    """Predict the target of a pair from its source (multilingual NMT: arXiv:1611.04558)."""

    directions: Directions = FromEnglish()

    @property
    def name(self) -> str:
        return "translation"

    def streams(
        self, shards: TokenShards, *, languages: Sequence[str], split: str
    ) -> list[TaskStream]:
        pairs = self.translated_pairs(shards, languages=languages)
        return [TaskStream(*p, self.directions.rows(shards, p, split=split)) for p in pairs]

    def translated_pairs(
        self, corpus: StoredPairs, *, languages: Sequence[str]
    ) -> list[LanguagePair]:
        pairs = self.directions.language_pairs(corpus)
        return [pair for pair in pairs if set(pair) <= set(languages)]


class Denoising(Task):
    """Predict a text from a corrupted copy of it (BART, arXiv:1910.13461).

    The default noise is that of multitask multilingual translation (Wang et al. 2020,
    arXiv:2010.02523): span infilling, token deletion, masking and shuffling. ``noise:
    [InfillSpans]`` alone is mBART's (arXiv:2001.08210).
    """

    noise: tuple[TextNoise, ...] = (InfillSpans(), DeleteTokens(), MaskTokens(), ShuffleTokens())
    languages: tuple[str, ...] = ()
    """Only these; empty: all."""

    @property
    def name(self) -> str:
        return "denoising"

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(sorted({role for noise in self.noise for role in noise.roles}))

    def streams(
        self, shards: TokenShards, *, languages: Sequence[str], split: str
    ) -> list[TaskStream]:
        return _text_streams(shards, self.languages or languages, languages=languages, split=split)

    def corrupt_source(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        for step, noise in enumerate(self.noise):
            rows = noise(rows, key=random_bits(key, step), vocabulary=vocabulary)
        return rows


class CausalLM(Task):
    """Predict a text from its language token alone; ``packing`` makes rows of documents."""

    packing: DocumentPacking = WholeTexts()
    languages: tuple[str, ...] = ()
    """Only these; empty: all."""

    @property
    def name(self) -> str:
        return "causal-lm"

    def streams(
        self, shards: TokenShards, *, languages: Sequence[str], split: str
    ) -> list[TaskStream]:
        return _text_streams(shards, self.languages or languages, languages=languages, split=split)

    def pieces(self, length: IntArray, *, stream: IntArray, window: int) -> DocumentPieces | None:
        return self.packing.pieces(length, stream=stream, window=window)

    def max_source_lengths(self, source: IntArray) -> IntArray:
        return source * 0

    def corrupt_source(self, rows: Ragged, *, key: UInt64Array, vocabulary: Vocabulary) -> Ragged:
        del key, vocabulary
        return Ragged.empty(len(rows))


def _text_streams(
    shards: TokenShards, chosen: Sequence[str], *, languages: Sequence[str], split: str
) -> list[TaskStream]:
    known = set(languages) & set(shards.languages)
    return [
        TaskStream(code, code, shards.text_rows(code, split=split, domain=domain), domain)
        for code in sorted(chosen)
        if code in known
        for domain in shards.domains(code, split=split) or ("",)
    ]
