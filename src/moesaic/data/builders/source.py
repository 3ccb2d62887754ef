"""Source: where the raw pairs of a corpus come from, in two steps: fetch, then read."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from moesaic.core.config import Choice
from moesaic.data.pair import Pair, Text, Unfit

Place = Literal["any", "train", "held-out"]
Wanted = Callable[[str], bool]  # is this language code asked for?


@runtime_checkable
class Progress(Protocol):
    """Whoever listens while a corpus is built."""

    def say(self, text: str) -> None: ...


class Quiet:
    """Listens to nothing."""

    def say(self, text: str) -> None:
        del text


@dataclass(frozen=True, slots=True)
class Unit:
    """One thing that is read at a time: a package or a file, on disk, with its version and licence.

    ``place`` says where its rows may go: ``any`` (the split decides), or an extract's own split.
    ``part`` is which source of several it belongs to. ``missing`` is why a unit could not be had:
    it is listed and not read.
    """

    name: str
    path: Path
    version: str = ""
    licence: str = ""
    place: Place = "any"
    part: tuple[int, ...] = ()
    missing: str = ""


class Source(Choice):
    """Family: fetch makes everything local (the only step that uses the network); read reads it."""

    @abstractmethod
    def fetch(self, *, progress: Progress) -> tuple[Unit, ...]:
        """Bring every unit onto this machine.

        One of many that cannot be had may be returned as ``missing``; UserError when nothing can.
        """

    def inputs(self) -> tuple[Path, ...]:
        """The user's own files that this reads: when one changes, the corpus is built again."""
        return ()

    @abstractmethod
    def read(self, unit: Unit, *, wanted: Wanted) -> Iterator[Pair | Text | Unfit]:
        """Yield the raw pairs and texts of a unit in the languages that are ``wanted``."""
