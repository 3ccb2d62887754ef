"""Searches over a table of probabilities small enough to enumerate every hypothesis."""

import itertools

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.data.tokenizer import EOS
from moesaic.model.generate import Beam, Greedy, SearchInputs

V, ROOM = 6, 4


class Table:
    """A bigram model: logits of the next token depend on the last one."""

    def __init__(self, seed, sources=1):
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(V, V, generator=draw) * 1.5
        self.first = torch.randn(sources, V, generator=draw)

    def problem(self, *, room=ROOM, forbidden=()):
        mask = torch.zeros(V, dtype=torch.bool)
        mask[list(forbidden)] = True
        return SearchInputs(
            logits=self.first,
            step=lambda last: self.table[last],
            reorder_cache=lambda _: None,
            max_tokens=torch.full((len(self.first),), room),
            suppressed=mask,
        )

    def log_prob(self, ids, source=0):
        total, logits = 0.0, self.first[source]
        for token in ids:
            total += float(logits.log_softmax(-1)[token])
            logits = self.table[token]
        return total

    def answers(self, room=ROOM):
        """Every finished answer and every one cut off at ``room``."""
        words = [t for t in range(V) if t != EOS]
        for length in range(room + 1):
            for ids in itertools.product(words, repeat=length):
                if length < room:
                    yield ids, self.log_prob((*ids, EOS)), True
                else:
                    yield ids, self.log_prob(ids), False


@pytest.mark.parametrize("seed", range(5))
def test_greedy_selects_the_most_probable_token_until_eos(seed):
    table = Table(seed)
    (answer,) = Greedy()(table.problem())[0]
    ids, logits = [], table.first[0]
    for _ in range(ROOM):
        token = int(logits.argmax())
        if token == EOS:
            break
        ids.append(token)
        logits = table.table[token]
    assert answer.ids == tuple(ids)
    assert answer.finished == (len(ids) < ROOM)


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_hypothesis_of_all(seed):
    table = Table(seed)
    size = 600  # wider than the number of prefixes
    (best,) = Beam(size=size, length_penalty=0.0)(table.problem())[0]
    want = max(table.answers(), key=lambda answer: answer[1])
    assert best.ids == want[0]
    assert best.log_prob == pytest.approx(want[1], abs=1e-4)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
def test_scores_are_log_probabilities_over_length_to_the_penalty(penalty):
    table = Table(7)
    for answer in Beam(size=5, n_best=5, length_penalty=penalty)(table.problem())[0]:
        tokens = (*answer.ids, EOS) if answer.finished else answer.ids
        assert answer.log_prob == pytest.approx(table.log_prob(tokens), abs=1e-4)
        assert answer.score == pytest.approx(answer.log_prob / len(tokens) ** penalty, abs=1e-5)


def test_n_best_hypotheses_are_distinct_and_in_order():
    answers = Beam(size=4, n_best=4)(Table(3).problem())[0]
    assert len({answer.ids for answer in answers}) == 4
    assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)


def test_suppressed_tokens_are_never_generated():
    for answer in Beam(size=4, n_best=4)(Table(3).problem(forbidden=(0, 5)))[0]:
        assert not {0, 5} & set(answer.ids)


def test_each_source_ends_at_its_own_limit():
    table = Table(11, sources=3)
    table.table[:, EOS] = -50.0
    table.first[:, EOS] = -50.0
    problem = table.problem()
    limits = torch.tensor([1, 5, 3])
    problem = SearchInputs(
        problem.logits, problem.step, problem.reorder_cache, limits, problem.suppressed
    )
    answers = Beam(size=3)(problem)
    assert [len(best.ids) for (best,) in answers] == [1, 5, 3]
    assert not any(best.finished for (best,) in answers)


def test_a_source_does_not_change_another():
    table = Table(5, sources=4)
    together = Beam(size=3, n_best=2)(table.problem())
    for source in range(4):
        alone = Table(5, sources=4)
        alone.first = alone.first[source : source + 1]
        assert Beam(size=3, n_best=2)(alone.problem())[0] == together[source]


def test_n_best_above_the_beam_size_is_refused():
    with pytest.raises(ConfigError, match="size=2"):
        Beam(size=2, n_best=3)
