"""Searches over a table of probabilities small enough to enumerate every hypothesis."""

import itertools
from dataclasses import replace

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.model.beam_search import Beam, Greedy, NonFiniteLogitsError, SearchInputs

V, ROOM, EOS = 6, 4, 2


class Table:
    """A bigram model: logits of the next token depend on the last one."""

    def __init__(self, seed, sources=1):
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(V, V, generator=draw) * 1.5
        self.first = torch.randn(sources, V, generator=draw)

    def problem(self, *, room=ROOM, forbidden=(), **more):
        return SearchInputs(
            logits=self.first,
            step=lambda last: self.table[last],
            reorder_cache=lambda *_: None,
            max_tokens=torch.full((len(self.first),), room),
            suppressed=torch.tensor(forbidden, dtype=torch.long),
            ends=(EOS,),
            **more,
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
    problem = replace(problem, max_tokens=limits)
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


def reference_beam(table, config, *, room, suppressed=()):
    """Beam search over python lists, one source, with the stopping rules as transformers has them:
    https://github.com/huggingface/transformers/blob/v4.57.0/src/transformers/generation/utils.py
    """
    unfinished, finished = [((), 0.0)], []

    def score(log_prob, length):
        return log_prob / length**config.length_penalty

    for length in range(1, room + 1):
        candidates = []
        for ids, total in unfinished:
            logits = table.first[0] if not ids else table.table[ids[-1]]
            log_prob = logits.log_softmax(-1).tolist()
            seen = [
                ids[i : i + config.no_repeat_ngram_size]
                for i in range(len(ids) - config.no_repeat_ngram_size + 1)
            ]
            for token in range(V):
                begun = (*ids, token)[-config.no_repeat_ngram_size :]
                repeated = config.no_repeat_ngram_size and begun in seen
                if token not in suppressed and not repeated:
                    candidates.append(((*ids, token), total + log_prob[token]))
        candidates.sort(key=lambda c: -c[1])
        for ids, total in candidates[: config.size]:
            if ids[-1] == EOS:
                finished.append((ids[:-1], score(total, length)))
        finished.sort(key=lambda f: -f[1])
        unfinished = [c for c in candidates if c[0][-1] != EOS][: config.size]
        full = len(finished) >= config.size
        worst = finished[config.size - 1][1] if full else float("-inf")
        best = max((total for _, total in unfinished), default=float("-inf"))
        reach = room if config.early_stopping == "never" else length
        if not unfinished or (
            full and (config.early_stopping is True or worst >= score(best, reach))
        ):
            return finished[: config.n_best]
    finished += [(ids, score(total, room)) for ids, total in unfinished]
    return sorted(finished, key=lambda f: -f[1])[: config.n_best]


RULES = [True, False, "never"]


def _compare_with_the_reference(table, config, *, room):
    found = config(table.problem(room=room))[0]
    want = reference_beam(table, config, room=room)
    assert [h.score for h in found] == pytest.approx([s for _, s in want], abs=1e-4)
    if not config.no_repeat_ngram_size:  # long answers of the same bigrams have equal scores
        assert [h.ids for h in found] == [ids for ids, _ in want]
    return [h.ids for h in found]


@pytest.mark.parametrize("rule", RULES)
def test_each_stopping_rule_equals_the_plain_search(rule):
    for seed in range(40):
        config = Beam(
            size=1 + seed % 4,
            n_best=1 + seed % min(2, 1 + seed % 4),
            length_penalty=[0.0, 0.6, 1.0, 2.0][seed // 4 % 4],
            early_stopping=rule,
        )
        _compare_with_the_reference(Table(seed), config, room=1 + seed % 7)


def test_the_stopping_rules_differ_and_a_later_stop_is_never_worse():
    chosen = {rule: [] for rule in RULES}
    for seed in range(60):
        table = Table(seed)
        for rule in RULES:
            config = Beam(size=2, length_penalty=2.0, early_stopping=rule)
            chosen[rule].append(config(table.problem(room=8))[0][0].score)
    assert len({tuple(scores) for scores in chosen.values()}) == 3
    for early, middle, late in zip(*(chosen[rule] for rule in RULES), strict=True):
        assert early <= middle + 1e-6 <= late + 2e-6


def test_a_full_width_search_without_early_stopping_finds_the_best_of_all():
    for seed, penalty in itertools.product(range(6), (0.0, 1.0, 2.0)):
        table = Table(seed)
        best = Beam(size=600, length_penalty=penalty, early_stopping="never")(table.problem())[0][0]
        want = max(s / (len(i) + f) ** penalty for i, s, f in table.answers() if len(i) + f)
        assert best.score == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_is_repeated_and_the_plain_search_agrees(size):
    blocked = 0
    for seed in range(25):
        table = Table(seed)
        table.table[:, EOS] -= 2.0
        free = Beam(size=3)(table.problem(room=9))[0][0].ids
        config = Beam(size=3, no_repeat_ngram_size=size)
        (ids,) = _compare_with_the_reference(table, config, room=9)
        ngrams = [ids[i : i + size] for i in range(len(ids) - size + 1)]
        assert len(set(ngrams)) == len(ngrams)
        blocked += free != ids
    assert blocked


def test_greedy_follows_the_rules_on_repetition():
    table = Table(3)
    table.table[:, EOS] = -50.0
    table.table[:, 3], table.table[:, 4] = 2.0, 5.0
    assert set(Greedy()(table.problem(room=8))[0][0].ids[1:]) == {4}
    ids = Greedy(no_repeat_ngram_size=1)(table.problem(room=5))[0][0].ids
    assert len(set(ids)) == len(ids)
    assert set(Greedy(repetition_penalty=9.0)(table.problem(room=8))[0][0].ids[1:]) != {4}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("search", [Greedy(), Beam(size=3)], ids=["greedy", "beam"])
def test_logits_that_are_not_finite_are_refused_at_the_token_they_appear(value, search):
    table = Table(1)
    table.first[0, 4] = value
    with pytest.raises(NonFiniteLogitsError, match="token 1"):
        search(table.problem())
    later = Table(1)
    later.first[0, EOS] = later.table[:, EOS].fill_(-9.0)[0]
    later.table[:, 3] = value
    with pytest.raises(NonFiniteLogitsError, match="token 2"):
        search(later.problem())


@pytest.mark.parametrize("search", [Greedy(), Beam(size=3, n_best=2)], ids=["greedy", "beam"])
def test_a_source_without_any_token_left_keeps_what_it_has(search):
    (nothing,) = search(Table(1).problem(forbidden=range(V)))[0]
    assert (nothing.ids, nothing.finished) == ((), False)

    def only_once(ids, source, log_prob):
        allowed = torch.tensor([ids.shape[1] == 0 and token in (4, 5) for token in range(V)])
        return log_prob.masked_fill(~allowed, float("-inf"))

    problem = replace(Table(1).problem(), processors=(only_once,))
    best = search(problem)[0][0]
    assert (len(best.ids), best.finished) == (1, False)


def test_a_processor_sees_the_source_of_each_row_and_changes_the_choice():
    table = Table(2, sources=3)

    def force(ids, source, log_prob):
        assert len(ids) == len(source) == len(log_prob)
        forced = torch.full_like(log_prob, float("-inf"))
        return forced.scatter(1, (source + 3)[:, None] % V, 0.0)

    problem = table.problem()
    for search in (Greedy(), Beam(size=2)):
        answers = search(replace(problem, processors=(force,)))
        assert [set(best.ids) for best, *_ in answers] == [{3}, {4}, {5}]


@pytest.mark.parametrize("value", ["always", 2, None])
def test_another_stopping_rule_is_refused(value):
    with pytest.raises(ConfigError, match="early_stopping"):
        Beam(early_stopping=value)
