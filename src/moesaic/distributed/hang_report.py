"""Hang report: which ranks the others wait for, from the heartbeats of all ranks, in a sentence.

A rank that waits in a collective is not the cause: the search continues from it to the members of
its group that have not entered the collective, until it reaches ranks that wait in no collective.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moesaic.core.errors import UserError
from moesaic.core.units import show_seconds
from moesaic.distributed.heartbeat import Heartbeat

ProcessState = Literal["alive", "stopped", "gone", "silent"]
RESUME_HINT = (
    "The last checkpoint is complete: start the same command again with --resume auto (torchrun "
    "--max-restarts does it by itself)"
)


@dataclass(frozen=True, slots=True)
class Peer:
    """The state of one rank, as read from its heartbeat.

    ``members`` is the group of its last collective. ``process`` is its process id and machine,
    empty where it has posted nothing; ``failure`` is the error that it posted before it ended.
    """

    rank: int
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    members: tuple[int, ...] = ()
    process: str = ""
    state: ProcessState = "alive"
    failure: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it waits in a collective, so that it is not the cause."""
        return self.heartbeat.in_collective and self.state == "alive" and not self.failure

    def has_entered_collective_of(self, waiter: "Peer") -> bool:
        """Whether it has entered the collective that ``waiter`` is in."""
        newest = waiter.heartbeat
        return self.heartbeat.collectives_entered(newest.group) >= newest.sequence_number

    def waits_with(self, waiter: "Peer") -> bool:
        """Whether it waits in the same collective as ``waiter``."""
        if self is waiter:
            return True
        same_group = self.heartbeat.group == waiter.heartbeat.group
        return same_group and self.is_waiting and self.has_entered_collective_of(waiter)


@dataclass(frozen=True, slots=True)
class HangReport:
    """The ranks that the others waited for and the collective, all of it in ``sentence``."""

    sentence: str
    ranks: tuple[int, ...] = ()
    op: str = ""
    sequence_number: int = 0
    step: int = 0
    phase: str = ""

    @classmethod
    def at(cls, heartbeat: Heartbeat, sentence: str, ranks: Iterable[int] = ()) -> "HangReport":
        """Return the report of a collective that ``heartbeat`` was in."""
        number, step, phase = heartbeat.sequence_number, heartbeat.step, heartbeat.phase
        return cls(sentence, tuple(sorted(ranks)), heartbeat.op, number, step, phase)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "HangReport":
        return cls(**{**value, "ranks": tuple(value["ranks"])})


class LostRankError(UserError):
    """A rank died, hung or lost its connection. ``report`` says which and where."""

    def __init__(self, report: HangReport) -> None:
        self.report = report
        super().__init__(f"{report.sentence}. {RESUME_HINT}")


@dataclass(slots=True)
class _LostRankSearch:
    peers: Mapping[int, Peer]
    visited: set[int] = field(default_factory=set)
    waiter_of: dict[int, Peer] = field(default_factory=dict)  # a lost rank -> who waits for it

    def visit(self, waiter: Peer) -> None:
        self.visited.add(waiter.rank)
        for rank in waiter.members:
            peer = self.peers[rank]
            if rank == waiter.rank or rank in self.visited:
                continue
            late = not peer.has_entered_collective_of(waiter)
            if late and peer.is_waiting:
                self.visit(peer)
            elif late or peer.failure or peer.state != "alive":
                self.waiter_of.setdefault(rank, waiter)


def find_lost_ranks(
    me: Peer, *, peers: Mapping[int, Peer], now_s: float, cause: str = ""
) -> HangReport:
    """Return which ranks keep ``me`` waiting. ``peers`` holds every rank, ``me`` too.

    ``cause`` is torch's error message; it is repeated where no rank is found to be missing.
    """
    search = _LostRankSearch(peers)
    search.visit(me)
    if not search.waiter_of:
        return _report_without_lost_rank(me, peers=peers, cause=cause)
    waiter = next(iter(search.waiter_of.values()))
    late = [peers[rank] for rank, other in search.waiter_of.items() if other is waiter]
    rest = [peers[rank] for rank, other in search.waiter_of.items() if other is not waiter]
    sentence = _lost_ranks_sentence(late, waiter=waiter, peers=peers)
    sentence += "".join(f". {_describe_peer(peer, now_s=now_s)}" for peer in [*late, *rest][:3])
    return HangReport.at(waiter.heartbeat, sentence, search.waiter_of)


def find_stalled_ranks(me: Peer, *, peers: Mapping[int, Peer], now_s: float) -> HangReport:
    """Return which ranks keep ``me`` waiting; if none do, which keep another rank waiting.

    One rank of each collective is asked: those that wait in the same one wait for the same ranks.
    """
    of_collective = {(p.heartbeat.group, p.heartbeat.sequence_number): p for p in peers.values()}
    own = find_lost_ranks(me, peers=peers, now_s=now_s)
    others = (find_lost_ranks(p, peers=peers, now_s=now_s) for p in of_collective.values())
    return own if own.ranks else next((report for report in others if report.ranks), own)


def report_unanswered_store(
    me: Peer, *, owner: Peer | None, now_s: float, cause: str
) -> HangReport:
    """Return the report of a rank whose rendezvous store does not answer.

    ``owner`` is the rank whose process serves the store, None where that is the launcher's or
    unknown. ``cause`` is the error message of the collective or of the store.
    """
    heartbeat = me.heartbeat
    activity = heartbeat.collective_text if heartbeat.in_collective else heartbeat.phase_text
    sentence = f"rank {me.rank} lost its peers in {activity}, and the rendezvous store"
    if owner is None:
        sentence += (
            " does not answer: the launcher, or rank 0 if it had none, ended first or is stopped"
        )
        return HangReport.at(heartbeat, f"{sentence} ({cause})")
    sentence += f", which rank {owner.rank} serves, does not answer ({cause}). "
    return HangReport.at(heartbeat, sentence + _describe_peer(owner, now_s=now_s), [owner.rank])


def _lost_ranks_sentence(late: Sequence[Peer], *, waiter: Peer, peers: Mapping[int, Peer]) -> str:
    collective, is_inside = waiter.heartbeat.collective_text, waiter.heartbeat.in_collective
    lost = format_ranks(peer.rank for peer in late)
    waiting = format_ranks(r for r in waiter.members if peers[r].waits_with(waiter))
    where = f", where {waiting} waited" if is_inside else ""
    if all(peer.has_entered_collective_of(waiter) for peer in late):
        were = "was" if len(late) == 1 else "were"
        return f"{lost} {were} lost {'in' if is_inside else 'after'} {collective}{where}"
    return f"{lost} did not reach {collective}{where}"


def _describe_peer(peer: Peer, *, now_s: float) -> str:
    if not peer.process:
        return f"Rank {peer.rank} has sent no heartbeat"
    process = f"its process {peer.process}"
    ago = show_seconds(max(now_s - peer.heartbeat.time_s, 0.0))
    if peer.failure:
        return f"Rank {peer.rank} failed {ago} ago ({peer.heartbeat.phase_text}): {peer.failure}"
    match peer.state:
        case "gone":
            state = f"{process} has exited without an error message"
        case "stopped":
            state = f"{process} is stopped (SIGSTOP)"
        case "silent":
            state = (
                f"{process} sends no heartbeat: it was killed or stopped, or its machine or "
                "network is down"
            )
        case _:
            state = f"{process} is alive but makes no progress"
    when = f"{ago} ago " if peer.heartbeat.serial else ""
    return f"Rank {peer.rank} was last seen {when}{_last_activity(peer.heartbeat)}; {state}"


def _last_activity(heartbeat: Heartbeat) -> str:
    if heartbeat.in_collective:
        return f"entering {heartbeat.collective_text}"
    after = f", after {heartbeat.op} #{heartbeat.sequence_number}" if heartbeat.op else ""
    return f"at {heartbeat.phase_text}{after}"


def _report_without_lost_rank(me: Peer, *, peers: Mapping[int, Peer], cause: str) -> HangReport:
    positions = [f"rank {r} in {peers[r].heartbeat.collective_text}" for r in me.members[:8]]
    reason = f" ({cause})" if cause else ""
    failed = f"no rank is missing, but {me.heartbeat.collective_text} failed{reason}"
    return HangReport.at(me.heartbeat, f"{failed}: {'; '.join(positions)}")


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
