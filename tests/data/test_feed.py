"""Feeds: positions are values, and a window is planned the same from each."""

import itertools

import pytest

import pipeline_cases as cases
from moesaic.core.errors import ConfigError
from moesaic.data.feed import Feed, LoaderConfig, Place
from moesaic.data.mixture import Mixture


def feed(config: LoaderConfig = cases.SMALL) -> Feed:
    mixture = Mixture(cases.MIXTURE, shards=cases.shards(), languages=cases.LANGUAGES, seed=1)
    return Feed(cases.shards(), tokenizer=cases.tokenizer(), mixture=mixture, config=config)


def test_following_from_any_position_gives_the_rest():
    made = list(itertools.islice(feed().follow(feed().start(), place=Place()), 25))
    for n, handed in enumerate(made[:-3]):
        again = itertools.islice(feed().follow(handed.after, place=Place()), 3)
        expected = [cases.rows(later.batch) for later in made[n + 1 : n + 4]]
        assert [cases.rows(later.batch) for later in again] == expected


def test_a_window_of_draws_is_handed_out_whole():
    first = []
    for handed in feed().follow(feed().start(), place=Place()):
        if handed.after.first:
            break
        first.append(handed.batch.rows)
        assert handed.counts.sum() == cases.SMALL.window
    assert sum(first) == cases.SMALL.window


@pytest.mark.parametrize("wrong", [{"window": 0}, {"batch_tokens": "many"}, {"windw": 9}])
def test_wrong_settings_are_refused_with_their_path(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoaderConfig.from_plain(wrong)
