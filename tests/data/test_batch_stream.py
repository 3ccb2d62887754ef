"""Batch streams: a window is planned the same from any position."""

import itertools

import pytest

import pipeline_cases as cases
from moesaic.core.errors import ConfigError
from moesaic.data.batch_stream import BatchStream, DataReplica, LoaderConfig
from moesaic.data.mixture import Mixture


def feed(config: LoaderConfig = cases.SMALL) -> BatchStream:
    mixture = Mixture(cases.MIXTURE, shards=cases.shards(), languages=cases.LANGUAGES, seed=1)
    return BatchStream(cases.shards(), tokenizer=cases.tokenizer(), mixture=mixture, config=config)


def test_batches_from_any_position_equal_the_rest():
    made = list(
        itertools.islice(feed().batches_from(feed().initial_position(), replica=DataReplica()), 25)
    )
    for n, found in enumerate(made[:-3]):
        again = itertools.islice(feed().batches_from(found.next_position, replica=DataReplica()), 3)
        expected = [cases.rows(later.batch) for later in made[n + 1 : n + 4]]
        assert [cases.rows(later.batch) for later in again] == expected


def test_every_draw_of_a_window_is_in_a_batch():
    first = []
    for found in feed().batches_from(feed().initial_position(), replica=DataReplica()):
        if found.next_position.first_draw:
            break
        first.append(found.batch.rows)
        assert found.counts.sum() == cases.SMALL.bucket_window
    assert sum(first) == cases.SMALL.bucket_window


@pytest.mark.parametrize(
    "wrong", [{"bucket_window": 0}, {"batch_tokens": "many"}, {"bucket_windw": 9}]
)
def test_wrong_settings_are_refused_with_their_path(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoaderConfig.from_dict(wrong)
