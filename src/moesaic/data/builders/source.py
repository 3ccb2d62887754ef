"""Source: where the raw pairs of a corpus come from, in two steps: fetch, then read."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from moesaic.core.config import Choice
from moesaic.data.pair import Pair, Text, RejectedPair

AllowedSplit = Literal["any", "train", "held-out"]
LanguageFilter = Callable[[str], bool]  # is this language code asked for?


@runtime_checkable
class ProgressListener(Protocol):
    """Whoever listens while a corpus is built."""

    def report_progress(self, text: str) -> None: ...


class SilentProgress:
    """Listens to nothing."""

    def report_progress(self, text: str) -> None:
        del text


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One thing that is read at a time: a package or a file, on disk, with its version and licence.

    ``place`` says where its rows may go: ``any`` (the split decides), or an extract's own split.
    ``part`` is which source of several it belongs to. ``missing`` is why a unit could not be had:
    it is listed and not read.
    """

    name: str
    path: Path
    version: str = ""
    licence: str = ""
    allowed_split: AllowedSplit = "any"
    source_index: tuple[int, ...] = ()
    missing_reason: str = ""


class TextSource(Choice):
    """Family: fetch makes everything local (the only step that uses the network); read reads it."""

    @abstractmethod
    def fetch(self, *, progress: ProgressListener) -> tuple[SourceFile, ...]:
        """Bring every unit onto this machine.

        One of many that cannot be had may be returned as ``missing``; UserError when nothing can.
        """

    def inputs(self) -> tuple[Path, ...]:
        """The user's own files that this reads: when one changes, the corpus is built again."""
        return ()

    @abstractmethod
    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair | Text | RejectedPair]:
        """Yield the raw pairs and texts of a unit in the languages that are ``wanted``."""
