"""Leaks: which held-out sources training has seen, exactly or nearly, in any direction."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moesaic.data.near import NearDuplicates
from moesaic.data.readers.text import read_lines
from moesaic.data.split import digest64


@dataclass(frozen=True, slots=True)
class LeakedSources:
    """Digests of split keys: those that are train keys too, and those that are almost one."""

    exact: frozenset[int] = frozenset()
    near: frozenset[int] = frozenset()


def find_leaks(keys: Path, *, near_duplicates: NearDuplicates) -> LeakedSources:
    """Compare the held-out keys of a file (``h`` and a key per line) with its train keys (``t``).

    Memory holds the held-out keys and a number for each different train key, beside what ``near``
    holds.
    """
    held = {line[1:] for _, line in read_lines(keys) if line[:1] == "h"}
    exact = {line[1:] for _, line in read_lines(keys) if line[:1] == "t" and line[1:] in held}
    close = near_duplicates.find(held - exact, train=_train_keys(keys)) if near_duplicates.enabled else frozenset[str]()
    return LeakedSources(frozenset(map(digest64, exact)), frozenset(map(digest64, close)))


def _train_keys(keys: Path) -> Iterator[str]:
    """Every different train key, in the order first seen."""
    seen: set[int] = set()
    for _, line in read_lines(keys):
        mark = digest64(line)
        if line[:1] == "t" and mark not in seen:
            seen.add(mark)
            yield line[1:]
