"""Collators: the position of every token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import pipeline_cases as cases
from moesaic.core.errors import DataError
from moesaic.data.batch import IGNORE_LABEL as NONE
from moesaic.data.collators import (
    DecoderOnlyCollator,
    EncoderDecoderCollator,
    RowLengths,
    TokenizedSamples,
)
from moesaic.data.language_tag import FirstTargetToken, NoTag, TwoTokenPrompt
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


def test_a_tag_that_is_predicted_is_a_label_of_the_token_before_it():
    batch, widths = both(EncoderDecoderCollator(tag=FirstTargetToken()), [[20], [0]], [[30], []])
    assert batch.source.values.tolist() == [[EN, 20, EOS], [EN, 0, EOS]]
    assert batch.target.values[:, :2].tolist() == [[EOS, DE]] * 2
    assert batch.labels.tolist() == [[DE, 30, EOS], [DE, EOS, NONE]]
    assert batch.target.tags.tolist() == [DE, DE]  # not the first token
    assert widths.target.tolist() == batch.target.lengths.tolist() == [3, 2]


def test_a_prompt_of_two_tokens_is_given_and_not_predicted():
    batch, _ = both(DecoderOnlyCollator(tag=TwoTokenPrompt(start="pad")), [[20], []], [[0], [31]])
    assert batch.target.values[0].tolist() == [EN, 20, EOS, ROLES.pad, DE, 0]
    assert batch.target.values[1, :3].tolist() == [ROLES.pad, DE, 31]
    assert batch.labels.tolist() == [[NONE] * 4 + [0, EOS], [NONE, 31, EOS] + [NONE] * 3]
    assert batch.target.lengths.tolist() == [6, 3]


def test_without_tags_a_row_needs_none():
    rows = samples([[20]], [[30]])
    plain = replace(rows, tokens={})
    batch = EncoderDecoderCollator(tag=NoTag()).collate(plain, vocabulary=ROLES)
    assert batch.source.values.tolist() == [[20, EOS]]
    assert (batch.target.values.tolist(), batch.labels.tolist()) == ([[EOS, 30]], [[30, EOS]])
    with pytest.raises(DataError, match="no bos token, which the rows of a batch needs"):
        EncoderDecoderCollator(tag=NoTag(start="bos")).collate(plain, vocabulary=ROLES)


def test_what_is_read_before_an_answer_is_the_row_without_it():
    for collator in (EncoderDecoderCollator(), DecoderOnlyCollator(tag=FirstTargetToken())):
        rows = samples([[20, 21], [22]], [[30], [31, 32]])
        whole = collator.collate(rows, vocabulary=ROLES)
        asked = collator.prompts(rows, vocabulary=ROLES)
        assert torch.equal(asked.source.values, whole.source.values)
        for row, length in enumerate(asked.target.lengths.tolist()):
            assert torch.equal(asked.target.values[row, :length], whole.target.values[row, :length])
            assert length + len([[30], [31, 32]][row]) == whole.target.lengths[row]
