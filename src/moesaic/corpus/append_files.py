"""Appending lines to many files, of which few are open at once: a process may not open them all."""

from pathlib import Path
from typing import TextIO

OPEN_FILES = 64


class AppendFiles:
    """Text files in new folders; the least recently written one is closed, and opened again."""

    def __init__(self, limit: int = OPEN_FILES) -> None:
        self._limit = limit
        self._open: dict[Path, TextIO] = {}  # the most recently written last

    def write(self, path: Path, line: str) -> None:
        """Append a line, with its line break, to the file at ``path``."""
        stream = self._open.pop(path, None)
        if stream is None:
            if len(self._open) == self._limit:
                self._open.pop(next(iter(self._open))).close()
            stream = path.open("a", encoding="utf-8", newline="\n")
        self._open[path] = stream
        stream.write(line)

    def close(self) -> None:
        """Close the files that are open."""
        for stream in self._open.values():
            stream.close()
        self._open.clear()
