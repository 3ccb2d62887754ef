"""Synthetic preferences: the order of pairs, its noise, and tasks that disagree."""

import numpy as np
import pytest

import pipeline_cases as cases
from moesaic.data.preferences import Preferences
from moesaic.data.ragged import Ragged


def _gold_of_pairs(task, split):
    shards = cases.shards()
    (stream,) = task.streams(shards, languages=("eng_Latn",), split=split)
    better, worse = stream.rows.text_ids(np.arange(stream.size))
    return task.gold_reward(shards.gather(better)), task.gold_reward(shards.gather(worse)), better


def test_every_text_is_in_two_pairs_and_never_with_itself():
    shards = cases.shards()
    (stream,) = Preferences(number=1).streams(shards, languages=("eng_Latn",), split="train")
    better, worse = stream.rows.text_ids(np.arange(stream.size))
    assert stream.size == 300
    assert (better != worse).all()
    assert set(np.bincount(np.concatenate([better, worse]) - min(better.min(), worse.min()))) == {2}


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_training_pairs_are_reversed_as_often_as_the_noise_says(noise):
    better, worse, _ = _gold_of_pairs(Preferences(number=1, noise=noise), "train")
    assert (better < worse).mean() == pytest.approx(noise, abs=0.08)


def test_held_out_pairs_are_in_the_order_of_the_gold_reward():
    better, worse, _ = _gold_of_pairs(Preferences(number=1, noise=0.4), "valid")
    assert len(better)
    assert (better >= worse).all()


def test_two_tasks_prefer_different_texts():
    first = _gold_of_pairs(Preferences(number=0, noise=0.0), "train")[2]
    second = _gold_of_pairs(Preferences(number=1, noise=0.0), "train")[2]
    assert 0.2 < (first != second).mean() < 0.8


def test_a_text_has_the_same_gold_reward_alone_and_among_others():
    task, rows = (
        Preferences(number=2),
        [np.array([5, 9, 9]), np.array([7]), np.array([], dtype=int)],
    )
    together = task.gold_reward(
        Ragged(np.concatenate(rows).astype(np.int64), np.array([len(r) for r in rows]))
    )
    alone = [task.gold_reward(Ragged(r.astype(np.int64), np.array([len(r)])))[0] for r in rows]
    assert together == pytest.approx(alone)
