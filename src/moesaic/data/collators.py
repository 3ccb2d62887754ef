"""Collators: from source and target texts to padded batches with language tokens and EOS.

Letters: B rows, S source length, L target length.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moesaic.core.config import Choice
from moesaic.data.batch import (
    IGNORE_LABEL,
    SOURCE_LANGUAGE,
    TARGET_LANGUAGE,
    TASK,
    Batch,
    InputRows,
)
from moesaic.data.document_packing import BEGIN, DocumentRows
from moesaic.data.numpy_counter_rng import UInt64Array
from moesaic.data.ragged import IntArray, Ragged
from moesaic.data.tokenizer import EOS


class RowLengths(NamedTuple):
    """Lengths [B] of both sides, special tokens included."""

    source: IntArray
    target: IntArray


@dataclass(frozen=True, slots=True)
class TokenizedSamples:
    """Rows as text tokens, without special tokens. All arrays are [B] except for the two texts.

    ``documents`` are the rows of packed documents among them, whose texts are empty here.
    """

    source: Ragged
    target: Ragged
    task: IntArray
    source_language: IntArray
    target_language: IntArray
    source_language_token: IntArray
    target_language_token: IntArray
    key: UInt64Array
    documents: DocumentRows | None = None

    def __len__(self) -> int:
        return len(self.target)


class Collator(Choice):
    """Adds special tokens to rows, and pads them to a batch."""

    def lengths(self, source: IntArray, *, target: IntArray) -> RowLengths:
        """Return the final lengths [B] for text lengths [B]."""
        raise NotImplementedError

    def collate(self, samples: TokenizedSamples, *, empty: RowLengths) -> Batch:
        """Return padded tensors; ``empty`` gives the widths when there are no rows."""
        raise NotImplementedError


class EncoderDecoderCollator(Collator):
    """Source ``[target language] text [EOS]``; the decoder starts with the target language token.

    The language token before the source is from Johnson et al. 2017 (arXiv:1611.04558).
    """

    def lengths(self, source: IntArray, *, target: IntArray) -> RowLengths:
        return RowLengths(source + 2, target + 1)

    def collate(self, samples: TokenizedSamples, *, empty: RowLengths) -> Batch:
        rows = np.arange(len(samples))
        widths = self.lengths(samples.source.lengths, target=samples.target.lengths)
        source = _grid(widths.source, empty.source)
        source[:, :1] = samples.target_language_token[:, None]
        _write_rows(source, samples.source, shift=1)
        source[rows, samples.source.lengths + 1] = EOS
        target = _grid(widths.target, empty.target)
        labels = np.full_like(target, IGNORE_LABEL)
        target[:, :1] = samples.target_language_token[:, None]
        _write_rows(target, samples.target, shift=1)
        _write_rows(labels, samples.target, shift=0)
        labels[rows, samples.target.lengths] = EOS
        return _to_batch(samples, widths, source=source, target=target, labels=labels)


class DecoderOnlyCollator(Collator):
    """One row ``[source language] source [EOS] [target language] target [EOS]``.

    Only the target is predicted. Without a source text (causal LM) the row is
    ``[target language] target [EOS]``; in packed rows each document begins so.
    """

    def lengths(self, source: IntArray, *, target: IntArray) -> RowLengths:
        return RowLengths(source * 0, np.where(source > 0, source + 2, 0) + target + 1)

    def collate(self, samples: TokenizedSamples, *, empty: RowLengths) -> Batch:
        rows = np.arange(len(samples))
        lengths = samples.source.lengths
        begin = np.where(lengths > 0, lengths + 2, 0)  # index of the target language token
        widths = self.lengths(lengths, target=samples.target.lengths)
        documents = samples.documents
        if documents is not None:
            widths.target[documents.rows] = documents.labels.lengths
        target = _grid(widths.target, empty.target)
        labels = np.full_like(target, IGNORE_LABEL)
        sourced = np.flatnonzero(lengths)
        target[sourced, 0] = samples.source_language_token[sourced]
        _write_rows(target, samples.source, shift=1)
        target[sourced, lengths[sourced] + 1] = EOS
        target[rows, begin] = samples.target_language_token
        _write_rows(target, samples.target, shift=begin + 1)
        _write_rows(labels, samples.target, shift=begin)
        labels[rows, begin + samples.target.lengths] = EOS
        if documents is not None:
            tag = samples.target_language_token[documents.rows][documents.inputs.row_index]
            inputs = np.where(documents.inputs.tokens == BEGIN, tag, documents.inputs.tokens)
            filled = Ragged(inputs, documents.inputs.lengths)
            _write_rows(target, filled, shift=0, rows=documents.rows)
            _write_rows(labels, documents.labels, shift=0, rows=documents.rows)
        source = np.zeros((len(samples), 0), dtype=np.int64)
        return _to_batch(samples, widths, source=source, target=target, labels=labels)


def _grid(lengths: IntArray, empty: IntArray) -> IntArray:
    width = int((lengths if lengths.size else empty).max(initial=1))
    return np.zeros((lengths.size, width), dtype=np.int64)


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
    samples: TokenizedSamples,
    lengths: RowLengths,
    *,
    source: IntArray,
    target: IntArray,
    labels: IntArray,
) -> Batch:
    groups = {
        TASK: samples.task,
        SOURCE_LANGUAGE: samples.source_language,
        TARGET_LANGUAGE: samples.target_language,
    }
    return Batch(
        source=InputRows(torch.from_numpy(source), torch.from_numpy(lengths.source)),
        target=InputRows(torch.from_numpy(target), torch.from_numpy(lengths.target)),
        labels=torch.from_numpy(labels),
        groups={name: torch.from_numpy(label) for name, label in groups.items()},
        key=torch.from_numpy(samples.key.view(np.int64)),
    )
