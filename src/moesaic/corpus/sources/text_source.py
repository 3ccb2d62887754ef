"""Source: where the raw pairs of a corpus come from, in two steps: fetch, then read.

Together: several sources as one.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moesaic.core.config import Choice
from moesaic.corpus.pair import Pair, RejectedPair, Text

AllowedSplit = Literal["any", "train", "held-out"]


LanguageFilter = Callable[[str], bool]  # is this language code asked for?


Progress = Callable[[str], object]  # called with one line of text at a time


def ignore_progress(_: str) -> None:
    """Show no progress."""


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
    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        """Bring every unit onto this machine.

        One of many that cannot be had may be returned as ``missing``; UserError when nothing can.
        """

    def inputs(self) -> tuple[Path, ...]:
        """The user's own files that this reads: when one changes, the corpus is built again."""
        return ()

    @abstractmethod
    def read(
        self, unit: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | Text | RejectedPair]:
        """Yield the raw pairs and texts of a unit in the languages that are ``wanted``."""


class CombinedSources(TextSource):
    """Everything of every source; where two give a source text different targets, both vote."""

    sources: tuple[TextSource, ...]

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        return tuple(
            replace(unit, source_index=(number, *unit.source_index))
            for number, source in enumerate(self.sources)
            for unit in source.fetch(progress=progress)
        )

    def inputs(self) -> tuple[Path, ...]:
        return tuple(path for source in self.sources for path in source.inputs())

    def read(
        self, unit: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | Text | RejectedPair]:
        number, *rest = unit.source_index
        yield from self.sources[number].read(replace(unit, source_index=tuple(rest)), wanted=wanted)
