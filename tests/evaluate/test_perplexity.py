import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.evaluate.perplexity import DocumentLoss, group_perplexities, sliding_windows


@given(length=st.integers(1, 80), window=st.integers(1, 20), data=st.data())
def test_every_position_is_scored_once_with_enough_before_it(length, window, data):
    stride = data.draw(st.integers(1, window))
    windows = list(sliding_windows(length, window=window, stride=stride))
    assert [p for w in windows for p in range(w.first, w.stop)] == list(range(length))
    for found in windows:
        assert found.stop - found.start <= window
        assert found.first - found.start >= (window - stride if found.start else 0)


def losses() -> list[DocumentLoss]:
    draw = np.random.default_rng(1)
    return [
        DocumentLoss(float(draw.gamma(20)), int(draw.integers(5, 30)), 50, language, domain)
        for language in ("deu_Latn", "eng_Latn")
        for domain in ("news", "books")
        for _ in range(20)
    ]


def test_groups_are_ratios_of_sums_within_their_intervals():
    found = losses()
    groups = {(g.language, g.domain): g for g in group_perplexities(found, resamples=100)}
    assert len(groups) == 9
    for (language, domain), group in groups.items():
        members = [d for d in found if language in ("", d.language) and domain in ("", d.domain)]
        nll, tokens = sum(d.nll for d in members), sum(d.tokens for d in members)
        assert group.documents == len(members)
        assert group.perplexity.score == pytest.approx(math.exp(nll / tokens))
        assert group.bits_per_byte.score == pytest.approx(nll / math.log(2) / 50 / len(members))
        for score in (group.perplexity, group.bits_per_byte):
            assert score.low < score.score < score.high


def test_a_group_that_equals_a_larger_one_is_left_out():
    one = [d for d in losses() if d.language == "eng_Latn" and d.domain == "news"]
    [group] = group_perplexities(one, resamples=10)
    assert group.name == "all documents"
