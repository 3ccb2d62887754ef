"""Feeds: positions are values, and a window is planned the same from each."""

import itertools

import pytest

import pipeline_cases as cases
from moesaic.core.errors import ConfigError
from moesaic.data.batch_stream import BatchStream, DataReplica, LoaderConfig
from moesaic.data.mixture import Mixture


def feed(config: LoaderConfig = cases.SMALL) -> BatchStream:
    mixture = Mixture(cases.MIXTURE, shards=cases.shards(), languages=cases.LANGUAGES, seed=1)
    return BatchStream(cases.shards(), tokenizer=cases.tokenizer(), mixture=mixture, config=config)


def test_following_from_any_position_gives_the_rest():
    made = list(
        itertools.islice(feed().batches_from(feed().initial_position(), replica=DataReplica()), 25)
    )
    for n, handed in enumerate(made[:-3]):
        again = itertools.islice(
            feed().batches_from(handed.next_position, replica=DataReplica()), 3
        )
        expected = [cases.rows(later.batch) for later in made[n + 1 : n + 4]]
        assert [cases.rows(later.batch) for later in again] == expected


def test_a_window_of_draws_is_handed_out_whole():
    first = []
    for handed in feed().batches_from(feed().initial_position(), replica=DataReplica()):
        if handed.next_position.first_draw:
            break
        first.append(handed.batch.rows)
        assert handed.counts.sum() == cases.SMALL.bucket_window
    assert sum(first) == cases.SMALL.bucket_window


@pytest.mark.parametrize(
    "wrong", [{"bucket_window": 0}, {"batch_tokens": "many"}, {"bucket_windw": 9}]
)
def test_wrong_settings_are_refused_with_their_path(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoaderConfig.from_dict(wrong)
