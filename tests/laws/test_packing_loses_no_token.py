"""Law: in an epoch of packed documents every token is predicted exactly once, at any window."""

from collections import Counter

import numpy as np
import pytest

import pipeline_cases as cases
from moesaic.data.batch import IGNORE_LABEL
from moesaic.data.document_packing import Concatenated, Separated

GREEK = "ell_Grek"
EOS = cases.tokenizer().vocabulary.eos


def documents() -> list[list[int]]:
    rows = cases.shards().text_rows(GREEK)
    return cases.lists(cases.shards().gather(rows.text_ids(np.arange(rows.size))[0]))


@pytest.mark.parametrize("packing", [Concatenated(), Separated()])
@pytest.mark.parametrize("window", [13, 16384])
def test_every_token_is_predicted_once_in_an_epoch(packing, window):
    texts = documents()
    expected = Counter(token for ids in texts for token in (*ids, EOS))
    config = cases.PACKED.replace(bucket_window=window)
    stream = cases.loader(config=config, mixture=cases.packed(packing, languages=(GREEK,)))
    for _ in range(2):
        found: Counter[int] = Counter()
        while found.total() < expected.total():
            labels = next(stream).labels
            found.update(labels[labels != IGNORE_LABEL].tolist())
        assert found == expected
    assert stream.num_draws == 2 * len(texts)
    assert not stream.skipped


def test_a_row_of_concatenated_documents_has_the_begin_token_after_each_end():
    mixture = cases.packed(Concatenated(), languages=(GREEK,))
    batch = next(cases.loader(config=cases.PACKED, mixture=mixture))
    tag = cases.tokenizer().vocabulary.tag(GREEK)
    inputs, labels = batch.target.values[:, 1:], batch.labels[:, :-1]
    real = batch.labels[:, 1:] != IGNORE_LABEL
    assert (inputs[real & (labels == EOS)] == tag).all()
    assert (inputs[real & (labels != EOS)] == labels[real & (labels != EOS)]).all()
