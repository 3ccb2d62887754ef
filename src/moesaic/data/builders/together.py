"""Together: several sources as one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moesaic.data.builders.source import Progress, Source, Unit, Wanted
from moesaic.data.pair import Pair, Text, Unfit


class Together(Source):
    """Everything of every source; where two give a source text different targets, both vote."""

    sources: tuple[Source, ...]

    def fetch(self, *, progress: Progress) -> tuple[Unit, ...]:
        return tuple(
            replace(unit, part=(number, *unit.part))
            for number, source in enumerate(self.sources)
            for unit in source.fetch(progress=progress)
        )

    def inputs(self) -> tuple[Path, ...]:
        return tuple(path for source in self.sources for path in source.inputs())

    def read(self, unit: Unit, *, wanted: Wanted) -> Iterator[Pair | Text | Unfit]:
        number, *rest = unit.part
        yield from self.sources[number].read(replace(unit, part=tuple(rest)), wanted=wanted)
