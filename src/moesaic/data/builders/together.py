"""Together: several sources as one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moesaic.data.builders.source import ProgressListener, TextSource, SourceFile, LanguageFilter
from moesaic.data.pair import Pair, Text, RejectedPair


class CombinedSources(TextSource):
    """Everything of every source; where two give a source text different targets, both vote."""

    sources: tuple[TextSource, ...]

    def fetch(self, *, progress: ProgressListener) -> tuple[SourceFile, ...]:
        return tuple(
            replace(unit, part=(number, *unit.source_index))
            for number, source in enumerate(self.sources)
            for unit in source.fetch(progress=progress)
        )

    def inputs(self) -> tuple[Path, ...]:
        return tuple(path for source in self.sources for path in source.inputs())

    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair | Text | RejectedPair]:
        number, *rest = unit.source_index
        yield from self.sources[number].read(replace(unit, part=tuple(rest)), wanted=wanted)
