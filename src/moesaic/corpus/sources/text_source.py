"""Text sources: where the raw pairs and texts of a corpus come from.

A source works in two steps: ``fetch`` makes its files local, ``read`` yields their rows.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moesaic.core.config import Choice
from moesaic.corpus.pair import Pair, RejectedPair, Text
from moesaic.corpus.text_rules import GeneralText, TextRules

AllowedSplit = Literal["any", "train", "held-out"]
LanguageFilter = Callable[[str], bool]  # true for the codes of the languages to read
Progress = Callable[[str], object]  # called with one line of text at a time


def ignore_progress(_: str) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that is read as a whole: a package or a local file, with its version and licence.

    ``allowed_split`` restricts its rows to a split, for folders that are split already.
    ``source_index`` is its source within ``CombinedSources``. ``languages`` are those of a local
    file: one (text), or source and target (pairs; empty where each row names its own); ``tags`` are
    the same as the user spelled them, where that says more (``de-AT``). A file
    with a ``missing_reason`` could not be fetched: it is listed in the manifest, and not read.
    """

    name: str
    path: Path
    version: str = ""
    licence: str = ""
    allowed_split: AllowedSplit = "any"
    source_index: tuple[int, ...] = ()
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    missing_reason: str = ""


class TextSource(Choice):
    """Family: sources of pairs and texts. Only ``fetch`` uses the network."""

    @abstractmethod
    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        """Make every file of the source local, and return them.

        A file that cannot be fetched may be returned with its ``missing_reason``. Raises UserError
        when none can be.
        """

    @property
    def default_text_rules(self) -> TextRules:
        """The text rules of a recipe that names none."""
        return GeneralText()

    def inputs(self) -> tuple[Path, ...]:
        """Return the user's files that this reads; when one changes, the corpus is built again."""
        return ()

    @abstractmethod
    def read(
        self, source_file: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | Text | RejectedPair]:
        """Yield the raw pairs and texts of a file in the languages that are ``wanted``."""


class CombinedSources(TextSource):
    """All rows of several sources; conflicting targets of a source text are resolved over all.

    A file that two sources of one kind have is read once, by the first: its rows have one vote.
    """

    sources: tuple[TextSource, ...]

    def fetch(self, *, progress: Progress) -> tuple[SourceFile, ...]:
        found: dict[object, SourceFile] = {}
        for number, source in enumerate(self.sources):
            for inner in source.fetch(progress=progress):
                source_file = replace(inner, source_index=(number, *inner.source_index))
                identity = inner.path.resolve() if inner.path.is_file() else source_file
                found.setdefault((type(source), identity, inner.languages), source_file)
        return tuple(found.values())

    def inputs(self) -> tuple[Path, ...]:
        return tuple(path for source in self.sources for path in source.inputs())

    def read(
        self, source_file: SourceFile, *, wanted: LanguageFilter
    ) -> Iterator[Pair | Text | RejectedPair]:
        number, *rest = source_file.source_index
        yield from self.sources[number].read(
            replace(source_file, source_index=tuple(rest)), wanted=wanted
        )
