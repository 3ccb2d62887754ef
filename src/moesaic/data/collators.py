"""Collators: from source and target texts to padded batches with special tokens.

Letters: B rows, S source length, L target length.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from moesaic.core.config import Choice
from moesaic.data.batch import (
    DOMAIN,
    IGNORE_LABEL,
    SOURCE_LANGUAGE,
    TARGET_LANGUAGE,
    TASK,
    Batch,
    InputRows,
)
from moesaic.data.document_packing import BEGIN, DocumentRows
from moesaic.data.language_tag import TARGET_TAG, FirstSourceToken, LanguageTag, RowFrame
from moesaic.data.numpy_counter_rng import UInt64Array
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.vocabulary import Vocabulary


class RowLengths(NamedTuple):
    """Lengths [B] of both sides, special tokens included."""

    source: IntArray
    target: IntArray


@dataclass(frozen=True, slots=True)
class TokenizedSamples:
    """Rows as text tokens, without special tokens. All arrays are [B] except for the two texts.

    ``tokens`` are special tokens that differ by row, by the names that a ``RowFrame`` uses.
    ``documents`` are the rows of packed documents among them, whose texts are empty here;
    ``domain`` is None where no text of the run has one.
    """

    source: Ragged
    target: Ragged
    task: IntArray
    source_language: IntArray
    target_language: IntArray
    tokens: Mapping[str, IntArray]
    key: UInt64Array
    documents: DocumentRows | None = None
    domain: IntArray | None = None

    def __len__(self) -> int:
        return len(self.target)


class Collator(Choice):
    """Adds special tokens to rows, and pads them to a batch."""

    tag: LanguageTag = FirstSourceToken()

    @property
    def frame(self) -> RowFrame:
        """The special tokens of a row."""
        raise NotImplementedError

    def lengths(self, source: IntArray, *, target: IntArray) -> RowLengths:
        """Return the final lengths [B] for text lengths [B]."""
        raise NotImplementedError

    def collate(
        self, samples: TokenizedSamples, *, vocabulary: Vocabulary, empty: RowLengths | None = None
    ) -> Batch:
        """Return padded tensors; ``empty`` gives the widths when there are no rows.

        Raises DataError for a special token that the vocabulary does not have.
        """
        raise NotImplementedError

    def prompts(self, samples: TokenizedSamples, *, vocabulary: Vocabulary) -> Batch:
        """Return what a model reads before it answers: rows without a target text."""
        empty = Ragged.empty(len(samples))
        return self.collate(replace(samples, target=empty), vocabulary=vocabulary)


class EncoderDecoderCollator(Collator):
    """The source is the encoder's input, the target the decoder's; each ends with ``eos``."""

    @property
    def frame(self) -> RowFrame:
        return self.tag.frame(decoder_only=False)

    def lengths(self, source: IntArray, *, target: IntArray) -> RowLengths:
        frame = self.frame
        return RowLengths(source + frame.source_specials, target + len(frame.prompt))

    def collate(
        self, samples: TokenizedSamples, *, vocabulary: Vocabulary, empty: RowLengths | None = None
    ) -> Batch:
        frame = self.frame
        special = _special_tokens(frame, samples, vocabulary)
        lengths = self.lengths(samples.source.lengths, target=samples.target.lengths)
        width = _width(lengths.source, empty.source if empty else None)
        source = np.zeros((len(samples), width), dtype=np.int64)
        _write_source(source, samples.source, frame=frame, special=special)
        begin = np.zeros(len(samples), dtype=np.int64)
        width = empty.target if empty else None
        target, labels = _target_side(samples, begin, width, frame=frame, special=special)
        inputs = InputRows(torch.from_numpy(source), torch.from_numpy(lengths.source))
        return _to_batch(samples, source=inputs, target=target, labels=labels)


class DecoderOnlyCollator(Collator):
    """One row: source, ``eos``, target, ``eos``, each text behind its special tokens.

    Only the target is predicted. Without a source text (causal LM) the row is the target alone. In
    packed rows each document begins with the last special token before a target.
    """

    @property
    def frame(self) -> RowFrame:
        return self.tag.frame(decoder_only=True)

    def lengths(self, source: IntArray, *, target: IntArray) -> RowLengths:
        frame = self.frame
        begin = np.where(source > 0, source + frame.source_specials, 0)
        return RowLengths(source * 0, begin + target + len(frame.prompt))

    def collate(
        self, samples: TokenizedSamples, *, vocabulary: Vocabulary, empty: RowLengths | None = None
    ) -> Batch:
        frame = self.frame
        special = _special_tokens(frame, samples, vocabulary)
        source = samples.source.lengths
        begin = np.where(source > 0, source + frame.source_specials, 0)
        width = empty.target if empty else None
        target, labels = _target_side(samples, begin, width, frame=frame, special=special)
        rows = np.flatnonzero(source)
        grid = target.values.numpy()
        sourced = grid[rows]
        texts = Ragged(samples.source.tokens, source[rows])
        named = {name: ids[rows] for name, ids in special.items()}
        _write_source(sourced, texts, frame=frame, special=named)
        grid[rows] = sourced
        if samples.documents is not None:
            begin_token = special[frame.prompt[-1]]
            _write_documents(target, labels, samples.documents, begin_token=begin_token)
        return _to_batch(
            samples, source=InputRows.empty(len(samples)), target=target, labels=labels
        )


class PairCollator(Collator):
    """Two rows of a sample, one after the other: its source, then its target, each with ``eos``.

    For heads that compare two texts (``Contrastive``, ``Reward``): the label of a first row is 0,
    that of a second ``IGNORE_LABEL``.
    """

    @property
    def frame(self) -> RowFrame:
        return self.tag.frame(decoder_only=True)

    def lengths(self, source: IntArray, *, target: IntArray) -> RowLengths:
        frame = self.frame
        return RowLengths(source + frame.source_specials, target + len(frame.prompt) + 1)

    def collate(
        self, samples: TokenizedSamples, *, vocabulary: Vocabulary, empty: RowLengths | None = None
    ) -> Batch:
        first, second = self.frame, RowFrame(self.frame.prompt, ())
        special = _special_tokens(self.frame, samples, vocabulary)
        lengths = self.lengths(samples.source.lengths, target=samples.target.lengths)
        widths = np.concatenate(empty if empty else lengths)
        sides = []
        for frame, texts in ((first, samples.source), (second, samples.target)):
            grid = np.zeros((len(samples), int(widths.max(initial=1))), dtype=np.int64)
            _write_source(grid, texts, frame=frame, special=special)
            sides.append(grid)
        both = torch.from_numpy(np.stack(sides, axis=1)).flatten(0, 1)
        rows = InputRows(both, torch.from_numpy(np.stack(lengths, axis=1)).flatten())
        labels = np.tile([0, IGNORE_LABEL], len(samples))
        once = _to_batch(samples, source=rows, target=rows, labels=labels)
        return Batch(
            source=InputRows.empty(rows.rows),
            target=rows,
            labels=once.labels,
            groups={name: label.repeat_interleave(2) for name, label in once.groups.items()},
            key=torch.stack([once.key, ~once.key], dim=1).flatten(),  # each row has its own
        )


def _special_tokens(
    frame: RowFrame, samples: TokenizedSamples, vocabulary: Vocabulary
) -> dict[str, IntArray]:
    """Return the ids [B] of every name of a frame: of the row, or of a role."""
    rows = len(samples)
    return {
        name: samples.tokens[name]
        if name in samples.tokens
        else np.full(rows, vocabulary.role(name, needed_by="the rows of a batch"), dtype=np.int64)
        for name in frame.names
    }


def _write_source(
    grid: IntArray, texts: Ragged, *, frame: RowFrame, special: Mapping[str, IntArray]
) -> None:
    """Write the special tokens and the text of sources from the first column on."""
    rows, first = np.arange(len(texts)), len(frame.source_start)
    for column, name in enumerate(frame.source_start):
        grid[:, column] = special[name]
    _write_rows(grid, texts, shift=first)
    grid[rows, texts.lengths + first] = special["eos"]


def _target_side(
    samples: TokenizedSamples,
    begin: IntArray,
    width: IntArray | None,
    *,
    frame: RowFrame,
    special: Mapping[str, IntArray],
) -> tuple[InputRows, IntArray]:
    """Return the decoder's rows, whose prompts start at ``begin`` [B], and their labels."""
    rows, texts, prompt = np.arange(len(samples)), samples.target, len(frame.prompt)
    lengths = begin + prompt + texts.lengths
    longest = lengths
    if samples.documents is not None:
        longest = np.concatenate([lengths, samples.documents.labels.lengths])
    target = np.zeros((len(rows), _width(longest, width)), dtype=np.int64)
    labels = np.full_like(target, IGNORE_LABEL)
    for place, name in enumerate(frame.prompt):
        target[rows, begin + place] = special[name]
        if place >= prompt - frame.predicted:
            labels[rows, begin + place - 1] = special[name]
    _write_rows(target, texts, shift=begin + prompt)
    _write_rows(labels, texts, shift=begin + prompt - 1)
    labels[rows, begin + prompt - 1 + texts.lengths] = special["eos"]
    # routers that ask for the tag get the row's first token, unless that is no tag
    tagged = TARGET_TAG in frame.prompt[1:]
    tag = torch.from_numpy(special[TARGET_TAG].astype(np.int64)) if tagged else None
    return InputRows(torch.from_numpy(target), torch.from_numpy(lengths), tag), labels


def _write_documents(
    target: InputRows, labels: IntArray, documents: DocumentRows, *, begin_token: IntArray
) -> None:
    """Write packed documents over their rows; ``begin_token`` [B] is the first of each document."""
    grid, rows, inputs = target.values.numpy(), documents.rows, documents.inputs
    grid[rows], labels[rows] = 0, IGNORE_LABEL
    tokens = np.where(inputs.tokens == BEGIN, begin_token[rows][inputs.row_index], inputs.tokens)
    _write_rows(grid, Ragged(tokens, inputs.lengths), shift=0, rows=rows)
    _write_rows(labels, documents.labels, shift=0, rows=rows)
    target.lengths.numpy()[rows] = inputs.lengths


def _width(lengths: IntArray, empty: IntArray | None) -> int:
    given = lengths if lengths.size or empty is None else empty
    return int(given.max(initial=1))


def _write_rows(
    grid: IntArray, texts: Ragged, *, shift: IntArray | int, rows: IntArray | None = None
) -> None:
    """Write texts into the grid, ``shift`` (one, or one per text) to the right.

    ``rows`` are the rows of the grid that they are written to; None: all.
    """
    number = np.arange(len(texts)) if rows is None else rows
    start = number * grid.shape[1] + shift - texts.starts
    index = np.repeat(start, texts.lengths) + np.arange(texts.tokens.size)
    grid.reshape(-1)[index] = texts.tokens


def _to_batch(
    samples: TokenizedSamples, *, source: InputRows, target: InputRows, labels: IntArray
) -> Batch:
    groups = {
        TASK: samples.task,
        SOURCE_LANGUAGE: samples.source_language,
        TARGET_LANGUAGE: samples.target_language,
    }
    if samples.domain is not None:
        groups[DOMAIN] = samples.domain
    return Batch(
        source=source,
        target=target,
        labels=torch.from_numpy(labels),
        groups={name: torch.from_numpy(label) for name, label in groups.items()},
        key=torch.from_numpy(samples.key.view(np.int64)),
    )
