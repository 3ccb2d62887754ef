"""Law: every stream is sampled in proportion to its weight, and every row once per epoch."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_cases as cases
from moesaic.data.mixture import Mixture, MixtureConfig, TokenCount, WeightedTask
from moesaic.data.numpy_counter_rng import random_permutation
from moesaic.data.tasks import Task, TaskStream, Translation
from moesaic.data.token_shards import TextRows


class ManyStreams(Task):
    """Streams of given sizes, to mix thousands without a corpus."""

    sizes: tuple[int, ...]

    @property
    def name(self):
        return "many"

    def streams(self, shards, *, languages, split):  # noqa: ARG002
        return [TaskStream("eng_Latn", "eng_Latn", TextRows(0, n, n)) for n in self.sizes]


def mixed(config, *, seed=1):
    return Mixture(config, shards=cases.shards(), languages=cases.LANGUAGES, seed=seed)


def many(sizes, *, temperature=1.0, seed=1):
    task = WeightedTask(task=ManyStreams(sizes=tuple(sizes)))
    return mixed(MixtureConfig(tasks=(task,), temperature=temperature), seed=seed)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 100_000), min_size=1, max_size=60),
    temperature=st.sampled_from([1.0, 2.0, 5.0, 100.0]),
    seed=st.integers(0, 2**31),
    count=st.integers(1, 20_000),
)
def test_mixture_frequencies_match_their_weights(sizes, temperature, seed, count):
    mixture = many(sizes, temperature=temperature, seed=seed)
    expected = np.array(sizes) ** (1 / temperature)
    np.testing.assert_allclose(mixture.weights, expected / expected.sum())
    drawn = np.bincount(mixture.stream_of_draws(np.arange(count)), minlength=len(sizes))
    # the discrepancy of the golden-ratio sequence: far below the binomial sqrt(count)
    assert np.abs(drawn - count * mixture.weights).max() <= 2 + math.log2(count)


def test_frequencies_match_late_in_a_run_and_over_a_thousand_streams():
    mixture = many(range(1, 1501), temperature=5.0)
    drawn = np.bincount(mixture.stream_of_draws(10**12 + np.arange(10**6)), minlength=1500)
    assert np.abs(drawn - 10**6 * mixture.weights).max() <= 22


def test_tasks_get_the_share_of_their_weight():
    mixture = mixed(cases.MIXTURE)
    shares = mixture.frequencies(mixture.initial_counts())
    assert sum(s.expected for s in shares if s.task == "translation") == pytest.approx(0.75)
    assert sum(s.expected for s in shares) == pytest.approx(1.0)
    square = {s.target_language: s.expected for s in shares if s.task == "translation"}
    assert square["deu_Latn"] / square["jpn_Jpan"] == pytest.approx((300 / 30) ** 0.5)


def test_the_table_of_shares_counts_what_was_drawn():
    stream = cases.loader()
    for _ in range(200):
        next(stream)
    table = stream.frequencies()
    total = sum(line.drawn for line in table)
    assert total % cases.SMALL.bucket_window == 0
    assert total > 1000
    assert all(abs(line.actual - line.expected) < 12 / total for line in table)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 9))
def test_a_permutation_visits_every_row_exactly_once(size, seed, epoch):
    found = random_permutation(np.arange(size), size=size, key=seed + epoch)
    assert sorted(found.tolist()) == list(range(size))


def test_two_epochs_have_different_orders():
    first, second = (random_permutation(np.arange(1000), size=1000, key=key) for key in (1, 2))
    assert (first == second).mean() < 0.02


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    windows=st.lists(st.integers(1, 97), min_size=3, max_size=12),
)
def test_each_stream_visits_every_row_once_per_epoch_however_the_run_is_windowed(sizes, windows):
    mixture = many(sizes)
    counts, first, seen = mixture.initial_counts(), 0, [[] for _ in sizes]
    for window in windows:
        draws = mixture.draw(first, count=window, counts=counts)
        for stream, index in zip(draws.stream, draws.row, strict=True):
            seen[stream].append(int(index))
        first, counts = first + window, mixture.counts_after(draws, counts=counts)
    whole = mixture.draw(0, count=first, counts=mixture.initial_counts())
    assert [whole.row[whole.stream == m].tolist() for m in range(len(sizes))] == seen
    for size, order in zip(sizes, seen, strict=True):
        for start in range(0, len(order) - size + 1, size):
            assert sorted(order[start : start + size]) == list(range(size))


def test_size_limit_size_unit_and_language_weights_change_the_weights():
    tasks = (WeightedTask(task=Translation()),)
    capped = mixed(MixtureConfig(tasks=tasks, size_limit=90))
    assert capped.weights.tolist() == pytest.approx([90 / 210, 90 / 210, 30 / 210])
    boosted = mixed(MixtureConfig(tasks=tasks, language_weights={"jpn_Jpan": 3.0}))
    assert boosted.weights.tolist() == pytest.approx([300 / 480, 90 / 480, 90 / 480])
    counted = mixed(MixtureConfig(tasks=tasks, size_unit=TokenCount()))
    tokens = [stream.rows.num_tokens for stream in counted.streams]
    assert counted.weights.tolist() == pytest.approx([n / sum(tokens) for n in tokens])
