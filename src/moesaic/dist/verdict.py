"""Verdict: from what every rank did last to the one that the others wait for, in a sentence.

A rank that waits in a collective is no cause: the search goes from it to the members that did not
come, and on from those that wait elsewhere, until it finds ranks that wait for nobody.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moesaic.core.errors import UserError
from moesaic.core.units import show_seconds
from moesaic.dist.marks import Mark

State = Literal["alive", "stopped", "gone", "silent"]
WAY_OUT = (
    "The last checkpoint is whole: start the same command again with --resume auto (torchrun "
    "--max-restarts does it by itself)"
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A rank as the others know it. ``members`` are the ranks of the group of its last mark.

    ``state`` is of its process; ``failure`` is the error that it ended with, if it could say so.
    """

    rank: int
    mark: Mark | None = None
    members: tuple[int, ...] = ()
    process: str = ""
    state: State = "alive"
    failure: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is held up by others, and no cause itself."""
        held = self.mark is not None and self.mark.inside
        return held and self.state == "alive" and not self.failure


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which ranks the others waited for, at which collective, and all of it as a sentence."""

    sentence: str
    ranks: tuple[int, ...] = ()
    op: str = ""
    number: int = 0
    step: int = 0
    place: str = ""

    def plain(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> "Verdict":
        return cls(**{**value, "ranks": tuple(value["ranks"])})


class LostRankError(UserError):
    """A rank died, hung or lost its connection. ``verdict`` says which and where."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        super().__init__(f"{verdict.sentence}. {WAY_OUT}")


@dataclass(slots=True)
class _Search:
    peers: Mapping[int, Peer]
    seen: set[int] = field(default_factory=set)
    found: dict[int, Peer] = field(default_factory=dict)  # a cause -> who waits for it

    def follow(self, waiter: Peer) -> None:
        self.seen.add(waiter.rank)
        for rank in waiter.members:
            peer = self.peers[rank]
            if rank == waiter.rank or rank in self.seen:
                continue
            late = not _came(peer, waiter)
            if late and peer.waits:
                self.follow(peer)
            elif late or peer.failure or peer.state != "alive":
                self.found.setdefault(rank, waiter)


def judge(me: Peer, *, peers: Mapping[int, Peer], now_s: float, cause: str = "") -> Verdict:
    """Return who keeps ``me`` waiting. ``peers`` holds every rank, ``me`` too.

    ``cause`` is what torch said; it is repeated where no rank is found to be missing.
    """
    search = _Search(peers)
    search.follow(me)
    if not search.found:
        return _disagreement(me, peers=peers, cause=cause)
    waiter = next(iter(search.found.values()))
    late = [peers[rank] for rank, other in search.found.items() if other is waiter]
    rest = [peers[rank] for rank, other in search.found.items() if other is not waiter]
    sentence = _accusation(late, waiter=waiter, peers=peers)
    sentence += "".join(f". {_described(peer, now_s=now_s)}" for peer in [*late, *rest][:3])
    mark = waiter.mark or Mark()
    ranks = tuple(sorted(search.found))
    return Verdict(sentence, ranks, mark.op, mark.number, mark.step, mark.place)


def _came(peer: Peer, waiter: Peer) -> bool:
    if waiter.mark is None or peer.mark is None:
        return False
    return peer.mark.came_to(waiter.mark.group) >= waiter.mark.number


def _accusation(late: Sequence[Peer], *, waiter: Peer, peers: Mapping[int, Peer]) -> str:
    mark = waiter.mark or Mark()
    who = show_ranks(peer.rank for peer in late)
    was = "was" if len(late) == 1 else "were"
    others = show_ranks(r for r in waiter.members if _waits_beside(peers[r], waiter))
    there = f", where {others} waited" if mark.inside else ""
    if all(_came(peer, waiter) for peer in late):
        return f"{who} {was} lost {'in' if there else 'after'} {mark.collective}{there}"
    return f"{who} did not come to {mark.collective}{there}"


def _waits_beside(peer: Peer, waiter: Peer) -> bool:
    if peer.mark is None or waiter.mark is None:
        return peer is waiter
    same = peer.mark.group == waiter.mark.group
    return peer is waiter or (same and peer.waits and _came(peer, waiter))


def _described(peer: Peer, *, now_s: float) -> str:
    process = f"its process {peer.process}" if peer.process else "its process"
    if peer.mark is None:
        return f"Rank {peer.rank} was never heard of"
    ago = show_seconds(max(now_s - peer.mark.time_s, 0.0))
    seen = f"{ago} ago {_last(peer.mark)}"
    if peer.failure:
        return f"Rank {peer.rank} failed {ago} ago ({peer.mark.where}): {peer.failure}"
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


def _last(mark: Mark) -> str:
    if mark.inside:
        return f"entering {mark.collective}"
    after = f", after {mark.op} #{mark.number}" if mark.op else ""
    return f"at {mark.where}{after}"


def _disagreement(me: Peer, *, peers: Mapping[int, Peer], cause: str) -> Verdict:
    mark = me.mark or Mark()
    places = [
        f"rank {rank} in {other.collective}"
        for rank in me.members[:8]
        if (other := peers[rank].mark) is not None
    ]
    said = f" ({cause})" if cause else ""
    sentence = f"no rank is missing, and yet {mark.collective} failed{said}: {'; '.join(places)}"
    return Verdict(sentence, (), mark.op, mark.number, mark.step, mark.place)


def show_ranks(ranks: Iterable[int]) -> str:
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
