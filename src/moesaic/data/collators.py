"""Collators: from source and target texts to padded batches with language tokens and EOS.

Letters: B rows, S source length, L target length.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moesaic.core.config import Choice
from moesaic.data.batch import PAD, Batch
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
        source = _padded_grid(widths.source, empty.source)
        source[:, :1] = samples.target_language_token[:, None]
        _write_rows(source, samples.source, shift=1)
        source[rows, samples.source.lengths + 1] = EOS
        target_in = _padded_grid(widths.target, empty.target)
        target_out = target_in.copy()
        target_in[:, :1] = samples.target_language_token[:, None]
        _write_rows(target_in, samples.target, shift=1)
        _write_rows(target_out, samples.target, shift=0)
        target_out[rows, samples.target.lengths] = EOS
        return _to_batch(samples, source, target_in, target_out)


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
        target_in = _padded_grid(widths.target, empty.target)
        target_out = target_in.copy()
        sourced = np.flatnonzero(lengths)
        target_in[sourced, 0] = samples.source_language_token[sourced]
        _write_rows(target_in, samples.source, shift=1)
        target_in[sourced, lengths[sourced] + 1] = EOS
        target_in[rows, begin] = samples.target_language_token
        _write_rows(target_in, samples.target, shift=begin + 1)
        _write_rows(target_out, samples.target, shift=begin)
        target_out[rows, begin + samples.target.lengths] = EOS
        if documents is not None:
            tag = samples.target_language_token[documents.rows][documents.inputs.row_index]
            inputs = np.where(documents.inputs.tokens == BEGIN, tag, documents.inputs.tokens)
            filled = Ragged(inputs, documents.inputs.lengths)
            _write_rows(target_in, filled, shift=0, rows=documents.rows)
            _write_rows(target_out, documents.labels, shift=0, rows=documents.rows)
        return _to_batch(
            samples, np.zeros((len(samples), 0), dtype=np.int64), target_in, target_out
        )


def _padded_grid(lengths: IntArray, empty: IntArray) -> IntArray:
    width = int((lengths if lengths.size else empty).max(initial=1))
    return np.full((lengths.size, width), PAD, dtype=np.int64)


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
    samples: TokenizedSamples, source: IntArray, target_in: IntArray, target_out: IntArray
) -> Batch:
    return Batch(
        source=torch.from_numpy(source),
        target_in=torch.from_numpy(target_in),
        target_out=torch.from_numpy(target_out),
        task=torch.from_numpy(samples.task),
        source_language=torch.from_numpy(samples.source_language),
        target_language=torch.from_numpy(samples.target_language),
        key=torch.from_numpy(samples.key.view(np.int64)),
    )
