"""Extract: a folder of ``LANG.train.tsv.xz`` and ``LANG.valid.tsv.xz``: domain, English, target.

Its own split is kept: train rows stay train rows, the others are shared out between valid and test.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.data.builders.source import AllowedSplit, ProgressListener, TextSource, SourceFile, LanguageFilter
from moesaic.data.languages import resolve_language
from moesaic.data.pair import Pair
from moesaic.data.readers.text import require_rows
from moesaic.data.readers.tsv import read_rows

ENGLISH = "eng_Latn"
_SPLIT_FILE = re.compile(r"(?P<language>.+)\.(?P<split>train|valid|test)\.tsv(\.gz|\.xz|\.zst)?")


class PresplitFolder(TextSource):
    """Pairs with English from such a folder; the domain (a package) is each pair's origin."""

    folder: str

    def fetch(self, *, progress: ProgressListener) -> tuple[SourceFile, ...]:
        del progress
        root = Path(self.folder)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        units = []
        for path in sorted(root.iterdir()):
            match = _SPLIT_FILE.fullmatch(path.name)
            if match:
                place: AllowedSplit = "train" if match["split"] == "train" else "held-out"
                units.append(SourceFile(resolve_language(match["language"]).code, path, allowed_split=place))
        if not units:
            raise DataError(f"{root}: no file named LANG.train.tsv, .tsv.gz, .tsv.xz or .tsv.zst")
        return tuple(units)

    def inputs(self) -> tuple[Path, ...]:
        root = Path(self.folder)
        return tuple(sorted(p for p in root.glob("*") if _SPLIT_FILE.fullmatch(p.name)))

    def read(self, unit: SourceFile, *, wanted: LanguageFilter) -> Iterator[Pair]:
        if not wanted(unit.name):
            return
        rows = require_rows(read_rows(unit.path, columns=3), path=unit.path, what="pairs")
        for row in rows:
            domain, english, target = row.fields[:3]
            yield Pair(english, target, ENGLISH, unit.name, domain, "not stated")
