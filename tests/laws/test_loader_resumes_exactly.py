"""Law: stopping and continuing, on any number of ranks, changes no batch."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline_cases as cases


def take(stream, count):
    return [cases.rows(next(stream)) for _ in range(count)]


@settings(max_examples=10, deadline=None)
@given(
    before=st.integers(0, 40),
    window=st.sampled_from([1, 7, 64, 500]),
    seed=st.integers(0, 9),
    setup=st.sampled_from(list(cases.SETUPS)),
)
def test_a_resumed_loader_equals_one_that_never_stopped(before, window, seed, setup):
    given = cases.SETUPS[setup]
    given = given | {"config": given["config"].replace(bucket_window=window), "seed": seed}
    whole = cases.loader(**given)
    take(whole, before)
    state = json.loads(json.dumps(whole.state()))
    resumed = cases.loader(**given)
    resumed.restore(state)
    assert take(resumed, 12) == take(whole, 12)
    assert resumed.state() == whole.state()
    assert resumed.skipped == whole.skipped
    assert resumed.frequencies() == whole.frequencies()


@settings(max_examples=5, deadline=None)
@given(before=st.integers(0, 30), ranks=st.sampled_from([(1, 4), (4, 2), (2, 3)]))
def test_a_run_resumes_on_another_number_of_ranks(before, ranks):
    old, new = ranks
    one = cases.loader()
    parts = [cases.loader(rank=r, world=old) for r in range(old)]
    take(one, before)
    states = []
    for part in parts:
        take(part, before)
        states.append(part.state())
    assert all(state == states[0] for state in states)
    again = [cases.loader(rank=r, world=new) for r in range(new)]
    for part in again:
        part.restore(states[0])
    for _ in range(10):
        union = sorted(row for part in again for row in cases.rows(next(part)))
        assert union == cases.rows(next(one))


def test_the_thread_changes_no_batch_and_its_state_is_that_of_the_next_one():
    plain, ahead = cases.loader(), cases.loader(config=cases.SMALL.replace(prefetch=3))
    with ahead:
        assert take(ahead, 30) == take(plain, 30)
        state = ahead.state()
        assert state == plain.state()
        following = take(ahead, 5)
        ahead.restore(state)
        assert take(ahead, 5) == following
