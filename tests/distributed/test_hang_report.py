"""Hang reports from the heartbeats of all ranks. The clock is at 100."""

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


def _report(*peers: Peer) -> HangReport:
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
def test_a_rank_that_did_not_reach_the_collective_is_named_with_its_state(
    state: Any, words: str
) -> None:
    report = _report(*WAITING, _peer(3, 117, state=state))
    assert report.ranks == (3,)
    assert (report.op, report.sequence_number, report.step) == ("all_reduce", 118, 7)
    assert report.sentence.startswith(
        "rank 3 did not reach all_reduce #118 (step 7, sum of gradients), where ranks 0-2 waited"
    )
    last = "Rank 3 was last seen 31s ago at step 7, sum of gradients, after all_reduce #117"
    assert last in report.sentence
    assert words in report.sentence


def test_a_rank_that_died_inside_the_collective_is_lost_in_it() -> None:
    report = _report(*WAITING, _peer(3, 118, inside=True, state="gone"))
    assert report.ranks == (3,)
    assert "rank 3 was lost in all_reduce #118" in report.sentence


def test_a_posted_failure_is_in_the_report() -> None:
    report = _report(*WAITING, _peer(3, 117, failure="ValueError: no"))
    assert "Rank 3 failed 31s ago (step 7, sum of gradients): ValueError: no" in report.sentence


def test_a_rank_without_a_heartbeat_is_named() -> None:
    report = _report(*WAITING, Peer(3, state="silent"))
    assert report.ranks == (3,)
    assert "Rank 3 has sent no heartbeat" in report.sentence


def test_a_rank_that_waits_in_another_group_is_not_the_cause() -> None:
    """Rank 0 waits for 1 in one group, 1 for 2 in another, and 2 is dead."""
    pair = Heartbeat(
        op="all_to_all",
        group="pair",
        in_collective=True,
        collective_counts={"pair": 9, DEFAULT_GROUP: 117},
    )
    middle = _peer(1, 117, heartbeat=pair, members=(1, 2))
    report = _report(
        _peer(0, 118, inside=True), middle, _peer(2, 117, state="gone"), _peer(3, 118, inside=True)
    )
    assert report.ranks == (2,)
    assert (report.op, report.sequence_number) == ("all_to_all", 9)
    assert "did not reach all_to_all #9" in report.sentence
    assert "where rank 1 waited" in report.sentence


def test_several_lost_ranks_are_named_together() -> None:
    report = _report(*WAITING[:2], _peer(2, 117, state="gone"), _peer(3, 117, state="gone"))
    assert report.ranks == (2, 3)
    assert report.sentence.startswith("ranks 2-3 did not reach all_reduce #118")


def test_without_a_lost_rank_the_report_has_all_positions_and_the_error() -> None:
    other = Heartbeat(
        op="all_gather", in_collective=True, step=7, collective_counts={DEFAULT_GROUP: 118}
    )
    report = _report(*WAITING, _peer(3, 118, heartbeat=other))
    assert report.ranks == ()
    assert "it said so" in report.sentence
    assert "rank 3 in all_gather #118" in report.sentence


def test_a_report_is_the_same_after_json() -> None:
    report = _report(*WAITING, _peer(3, 117))
    assert HangReport.from_dict(report.to_dict()) == report
    assert "--resume auto" in str(LostRankError(report))


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([2, 0, 1, 5], "ranks 0-2, 5"),
        ([0, 1], "ranks 0-1"),
        ([0, 2], "ranks 0, 2"),
    ],
)
def test_ranks_are_formatted_as_ranges(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text
