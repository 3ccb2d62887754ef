"""Verdicts: who is to blame, from what the ranks did last. The clock stands at 100."""

from typing import Any

import pytest

from moesaic.distributed.hang_report import (
    HangReport,
    LostRankError,
    Peer,
    find_lost_ranks,
    format_ranks,
)
from moesaic.distributed.heartbeat import DEFAULT_GROUP, Heartbeat


def _peer(rank: int, count: int, *, inside: bool = False, world: int = 4, **changes: Any) -> Peer:
    mark = Heartbeat(
        serial=count,
        time_s=69.0,
        step=7,
        phase="sum of gradients",
        op="all_reduce",
        in_collective=inside,
        collective_counts={DEFAULT_GROUP: count},
    )
    given = {"heartbeat": mark, "members": tuple(range(world)), "process": f"{40 + rank} on a"}
    return Peer(rank, **given | changes)


def _judge(*peers: Peer) -> HangReport:
    return find_lost_ranks(
        peers[0], peers={p.rank: p for p in peers}, now_s=100.0, cause="it said so"
    )


WAITING = tuple(_peer(rank, 118, inside=True) for rank in range(3))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("gone", "its process 43 on a has exited without an error message"),
        ("stopped", "its process 43 on a is stopped (SIGSTOP)"),
        ("silent", "its process 43 on a sends no heartbeat"),
        ("alive", "its process 43 on a is alive but makes no progress"),
    ],
)
def test_a_rank_that_did_not_come_is_named_with_what_became_of_it(state: Any, words: str) -> None:
    verdict = _judge(*WAITING, _peer(3, 117, state=state))
    assert verdict.ranks == (3,)
    assert (verdict.op, verdict.sequence_number, verdict.step) == ("all_reduce", 118, 7)
    assert verdict.sentence.startswith(
        "rank 3 did not reach all_reduce #118 (step 7, sum of gradients), where ranks 0-2 waited"
    )
    last = "Rank 3 was last seen 31s ago at step 7, sum of gradients, after all_reduce #117"
    assert last in verdict.sentence
    assert words in verdict.sentence


def test_a_rank_that_died_inside_is_told_from_one_that_did_not_come() -> None:
    verdict = _judge(*WAITING, _peer(3, 118, inside=True, state="gone"))
    assert verdict.ranks == (3,)
    assert "rank 3 was lost in all_reduce #118" in verdict.sentence


def test_a_failure_is_repeated() -> None:
    verdict = _judge(*WAITING, _peer(3, 117, failure="ValueError: no"))
    assert "Rank 3 failed 31s ago (step 7, sum of gradients): ValueError: no" in verdict.sentence


def test_a_rank_that_was_never_heard_of_is_named() -> None:
    verdict = _judge(*WAITING, Peer(3, state="silent"))
    assert verdict.ranks == (3,)
    assert "Rank 3 has sent no heartbeat" in verdict.sentence


def test_a_rank_that_waits_elsewhere_is_no_cause() -> None:
    """Rank 0 waits for 1 in one group, 1 for 2 in another, and 2 is dead."""
    pair = Heartbeat(
        op="all_to_all",
        group="pair",
        in_collective=True,
        collective_counts={"pair": 9, DEFAULT_GROUP: 117},
    )
    middle = _peer(1, 117, heartbeat=pair, members=(1, 2))
    verdict = _judge(
        _peer(0, 118, inside=True), middle, _peer(2, 117, state="gone"), _peer(3, 118, inside=True)
    )
    assert verdict.ranks == (2,)
    assert (verdict.op, verdict.sequence_number) == ("all_to_all", 9)
    assert "did not reach all_to_all #9" in verdict.sentence
    assert "where rank 1 waited" in verdict.sentence


def test_several_lost_ranks_are_named_together() -> None:
    verdict = _judge(*WAITING[:2], _peer(2, 117, state="gone"), _peer(3, 117, state="gone"))
    assert verdict.ranks == (2, 3)
    assert verdict.sentence.startswith("ranks 2-3 did not reach all_reduce #118")


def test_where_nobody_is_missing_all_places_and_torchs_words_are_given() -> None:
    other = Heartbeat(
        op="all_gather", in_collective=True, step=7, collective_counts={DEFAULT_GROUP: 118}
    )
    verdict = _judge(*WAITING, _peer(3, 118, heartbeat=other))
    assert verdict.ranks == ()
    assert "it said so" in verdict.sentence
    assert "rank 3 in all_gather #118" in verdict.sentence


def test_a_verdict_survives_being_sent() -> None:
    verdict = _judge(*WAITING, _peer(3, 117))
    assert HangReport.from_dict(verdict.to_dict()) == verdict
    assert "--resume auto" in str(LostRankError(verdict))


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([2, 0, 1, 5], "ranks 0-2, 5"),
        ([0, 1], "ranks 0-1"),
        ([0, 2], "ranks 0, 2"),
    ],
)
def test_ranks_are_shown_in_runs(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text
