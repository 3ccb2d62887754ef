"""Collators: the position of every token."""

import numpy as np

import pipeline_cases as cases
from moesaic.data.batch import IGNORE_LABEL as NONE
from moesaic.data.collators import (
    DecoderOnlyCollator,
    EncoderDecoderCollator,
    RowLengths,
    TokenizedSamples,
)
from moesaic.data.vocabulary import Vocabulary

EOS, DE, EN = 2, 6, 7
ROLES = Vocabulary(40, eos=EOS, pad=4)


def samples(source, target) -> TokenizedSamples:
    rows = len(source)
    full = [np.full(rows, n, dtype=np.int64) for n in (0, 1, 0)]
    tokens = {"source": np.full(rows, EN), "target": np.full(rows, DE)}
    return TokenizedSamples(
        cases.ragged(source),
        cases.ragged(target),
        *full,
        tokens=tokens,
        key=np.arange(rows, dtype=np.uint64),
    )


def both(collator, source, target):
    rows = samples(source, target)
    widths = collator.lengths(rows.source.lengths, target=rows.target.lengths)
    batch = collator.collate(rows, vocabulary=ROLES, empty=widths)
    return batch, widths


def test_encoder_decoder_rows_start_with_the_target_language():
    batch, widths = both(EncoderDecoderCollator(), [[20, 21], []], [[30], [31, 32, 33]])
    assert batch.source.values.tolist() == [[DE, 20, 21, EOS], [DE, EOS, 0, 0]]
    assert batch.target.values.tolist() == [[DE, 30, 0, 0], [DE, 31, 32, 33]]
    assert batch.labels.tolist() == [[30, EOS, NONE, NONE], [31, 32, 33, EOS]]
    assert widths.source.tolist() == batch.source.lengths.tolist()
    assert widths.target.tolist() == batch.target.lengths.tolist()


def test_decoder_only_rows_predict_only_the_target():
    batch, widths = both(DecoderOnlyCollator(), [[20, 21], []], [[30], [31, 32, 33]])
    assert batch.source.values.shape == (2, 0)
    assert batch.target.values.tolist() == [[EN, 20, 21, EOS, DE, 30], [DE, 31, 32, 33, 0, 0]]
    assert batch.labels.tolist() == [[NONE] * 4 + [30, EOS], [31, 32, 33, EOS, NONE, NONE]]
    assert widths.target.tolist() == batch.target.lengths.tolist()


def test_an_empty_batch_has_the_given_widths():
    width = RowLengths(np.array([9, 4]), np.array([5, 6]))
    for collator, shape in ((EncoderDecoderCollator(), (0, 9)), (DecoderOnlyCollator(), (0, 0))):
        batch = collator.collate(samples([], []), vocabulary=ROLES, empty=width)
        assert batch.source.values.shape == shape
        assert batch.target.values.shape == batch.labels.shape == (0, 6)
