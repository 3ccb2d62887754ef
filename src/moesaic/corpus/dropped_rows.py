"""Dropped rows: the first of each direction and reason, kept beside a corpus to be looked at."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.corpus.readers.tsv import escape_field, read_rows, unescape_field

DROPPED_FILE = "dropped.tsv"
MAX_PER_REASON = 50  # of a direction
_MAX_SHOWN = 300  # characters of a side


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that was dropped; ``direction`` is one language for a text.

    ``kept`` is the target that was kept in its place, if there is one.
    """

    direction: str
    reason: str
    source: str
    target: str = ""
    origin: str = ""
    kept: str = ""


@dataclass(slots=True)
class DroppedRows:
    """At most ``MAX_PER_REASON`` rows of each direction and reason, in the order of reading."""

    rows: list[DroppedRow] = field(default_factory=list)
    _numbers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, row: DroppedRow) -> None:
        """Keep a row, cut to a length for reading, unless there are enough of its kind."""
        key = (row.direction, row.reason)
        if self._numbers[key] < MAX_PER_REASON:
            self._numbers[key] += 1
            self.rows.append(DroppedRow(*map(_cut, astuple(row))))

    def add_all(self, rows: Iterable[DroppedRow]) -> None:
        """Add rows in order."""
        for row in rows:
            self.add(row)

    def write(self, path: Path) -> None:
        """Write a line per row, sorted by direction and reason."""
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            for row in sorted(self.rows, key=lambda row: (row.direction, row.reason)):
                stream.write("\t".join(map(_field, astuple(row))) + "\n")


def read_dropped(folder: Path) -> Iterator[DroppedRow]:
    """Yield the dropped rows beside a corpus. Raises DataError where there are none on disk."""
    path = folder / DROPPED_FILE
    if not path.is_file():
        raise DataError(f"{path}: missing; a corpus that is built again has one")
    for row in read_rows(path, columns=6):
        yield DroppedRow(*map(unescape_field, row.fields[:6]))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _field(text: str) -> str:
    return escape_field(text.encode("utf-8", errors="replace").decode())
