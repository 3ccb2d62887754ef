"""Verdict: from what every rank did last to the one that the others wait for, in a sentence.

A rank that waits in a collective is no cause: the search goes from it to the members that did not
come, and on from those that wait elsewhere, until it finds ranks that wait for nobody.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moesaic.core.errors import UserError
from moesaic.core.units import show_seconds
from moesaic.distributed.heartbeat import Heartbeat

ProcessState = Literal["alive", "stopped", "gone", "silent"]
RESUME_HINT = (
    "The last checkpoint is whole: start the same command again with --resume auto (torchrun "
    "--max-restarts does it by itself)"
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A rank as the others know it. ``members`` are the ranks of the group of its last mark.

    ``state`` is of its process; ``failure`` is the error that it ended with, if it could say so.
    """

    rank: int
    heartbeat: Heartbeat | None = None
    members: tuple[int, ...] = ()
    process: str = ""
    state: ProcessState = "alive"
    failure: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it is held up by others, and no cause itself."""
        held = self.heartbeat is not None and self.heartbeat.in_collective
        return held and self.state == "alive" and not self.failure


@dataclass(frozen=True, slots=True)
class HangReport:
    """Which ranks the others waited for, at which collective, and all of it as a sentence."""

    sentence: str
    ranks: tuple[int, ...] = ()
    op: str = ""
    sequence_number: int = 0
    step: int = 0
    phase: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "HangReport":
        return cls(**{**value, "ranks": tuple(value["ranks"])})


class LostRankError(UserError):
    """A rank died, hung or lost its connection. ``verdict`` says which and where."""

    def __init__(self, report: HangReport) -> None:
        self.report = report
        super().__init__(f"{report.sentence}. {RESUME_HINT}")


@dataclass(slots=True)
class _LostRankSearch:
    peers: Mapping[int, Peer]
    seen: set[int] = field(default_factory=set)
    found: dict[int, Peer] = field(default_factory=dict)  # a cause -> who waits for it

    def visit(self, waiter: Peer) -> None:
        self.seen.add(waiter.rank)
        for rank in waiter.members:
            peer = self.peers[rank]
            if rank == waiter.rank or rank in self.seen:
                continue
            late = not _has_entered(peer, waiter)
            if late and peer.is_waiting:
                self.visit(peer)
            elif late or peer.failure or peer.state != "alive":
                self.found.setdefault(rank, waiter)


def find_lost_ranks(
    me: Peer, *, peers: Mapping[int, Peer], now_s: float, cause: str = ""
) -> HangReport:
    """Return who keeps ``me`` waiting. ``peers`` holds every rank, ``me`` too.

    ``cause`` is what torch said; it is repeated where no rank is found to be missing.
    """
    search = _LostRankSearch(peers)
    search.visit(me)
    if not search.found:
        return _report_without_lost_rank(me, peers=peers, cause=cause)
    waiter = next(iter(search.found.values()))
    late = [peers[rank] for rank, other in search.found.items() if other is waiter]
    rest = [peers[rank] for rank, other in search.found.items() if other is not waiter]
    sentence = _lost_ranks_sentence(late, waiter=waiter, peers=peers)
    sentence += "".join(f". {_describe_peer(peer, now_s=now_s)}" for peer in [*late, *rest][:3])
    mark = waiter.heartbeat or Heartbeat()
    ranks = tuple(sorted(search.found))
    return HangReport(sentence, ranks, mark.op, mark.sequence_number, mark.step, mark.phase)


def _has_entered(peer: Peer, waiter: Peer) -> bool:
    if waiter.heartbeat is None or peer.heartbeat is None:
        return False
    return (
        peer.heartbeat.collectives_entered(waiter.heartbeat.group)
        >= waiter.heartbeat.sequence_number
    )


def _lost_ranks_sentence(late: Sequence[Peer], *, waiter: Peer, peers: Mapping[int, Peer]) -> str:
    mark = waiter.heartbeat or Heartbeat()
    who = format_ranks(peer.rank for peer in late)
    was = "was" if len(late) == 1 else "were"
    others = format_ranks(r for r in waiter.members if _waits_in_same_collective(peers[r], waiter))
    there = f", where {others} waited" if mark.in_collective else ""
    if all(_has_entered(peer, waiter) for peer in late):
        return f"{who} {was} lost {'in' if there else 'after'} {mark.collective_text}{there}"
    return f"{who} did not come to {mark.collective_text}{there}"


def _waits_in_same_collective(peer: Peer, waiter: Peer) -> bool:
    if peer.heartbeat is None or waiter.heartbeat is None:
        return peer is waiter
    same = peer.heartbeat.group == waiter.heartbeat.group
    return peer is waiter or (same and peer.is_waiting and _has_entered(peer, waiter))


def _describe_peer(peer: Peer, *, now_s: float) -> str:
    process = f"its process {peer.process}" if peer.process else "its process"
    if peer.heartbeat is None:
        return f"Rank {peer.rank} was never heard of"
    ago = show_seconds(max(now_s - peer.heartbeat.time_s, 0.0))
    seen = f"{ago} ago {_last_activity(peer.heartbeat)}"
    if peer.failure:
        return f"Rank {peer.rank} failed {ago} ago ({peer.heartbeat.phase_text}): {peer.failure}"
    match peer.state:
        case "gone":
            what = f"{process} has ended without a word"
        case "stopped":
            what = f"{process} is stopped (SIGSTOP)"
        case "silent":
            what = (
                f"nothing is heard of {process}: it was killed or stopped, or its machine or "
                "network is down"
            )
        case _:
            what = f"{process} is alive but does not go on"
    return f"Rank {peer.rank} was last seen {seen}; {what}"


def _last_activity(mark: Heartbeat) -> str:
    if mark.in_collective:
        return f"entering {mark.collective_text}"
    after = f", after {mark.op} #{mark.sequence_number}" if mark.op else ""
    return f"at {mark.phase_text}{after}"


def _report_without_lost_rank(me: Peer, *, peers: Mapping[int, Peer], cause: str) -> HangReport:
    mark = me.heartbeat or Heartbeat()
    places = [
        f"rank {rank} in {other.collective_text}"
        for rank in me.members[:8]
        if (other := peers[rank].heartbeat) is not None
    ]
    said = f" ({cause})" if cause else ""
    sentence = (
        f"no rank is missing, and yet {mark.collective_text} failed{said}: {'; '.join(places)}"
    )
    return HangReport(sentence, (), mark.op, mark.sequence_number, mark.step, mark.phase)


def format_ranks(ranks: Iterable[int]) -> str:
    """``[0, 1, 2, 5] -> 'ranks 0-2, 5'``; ``[3] -> 'rank 3'``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
    many = len(runs) > 1 or (bool(runs) and len(runs[0]) > 1)
    return f"{'ranks' if many else 'rank'} {', '.join(parts)}"
