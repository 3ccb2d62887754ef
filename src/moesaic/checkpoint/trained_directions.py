"""Trained directions: what a run was trained on, as ``directions.json`` in its run directory.

Written when training starts, from the streams of the data mixture. Evaluation scores these
directions, and translation warns about others, without opening the corpus. The file::

    {"format": 1, "corpus": {"name": "mine", "fingerprint": "<sha256>"},
     "streams": [{"task": "translation", "source": "deu_Latn", "target": "eng_Latn",
                  "rows": 240, "valid_rows": 12, "test_rows": 13, "share": 0.9}, ...]}

A stream whose source and target are one language is no translation (denoising, language models).
A stream of share 0 was trained by the run that this one started from (``train --init``), not here.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from moesaic.core.errors import CheckpointError
from moesaic.core.file_reader import MIB, Count, FileKind, FileShape
from moesaic.core.files import write_json

DIRECTIONS_FORMAT = 1
DIRECTIONS_FILE = FileKind(
    name="record of trained directions",
    max_bytes=64 * MIB,
    error=CheckpointError,
    way_out="delete it, and the directions are read from config.yaml and the corpus",
)
LanguageDirection = tuple[str, str]


class TrainedStream(FileShape):
    """Rows of one task in one direction and domain, and their expected share of the samples."""

    task: str
    source: str
    target: str
    rows: Count
    valid_rows: Count
    test_rows: Count
    share: float = Field(ge=0, le=1.001)  # a sum of shares may be rounded
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedDirections:
    """The streams of a run, and the corpus that they are of (its name and fingerprint)."""

    corpus: str
    fingerprint: str
    streams: tuple[TrainedStream, ...]

    @property
    def directions(self) -> tuple[LanguageDirection, ...]:
        """The directions of translation (source, target) that the weights were trained in."""
        pairs = ((s.source, s.target) for s in self.streams if s.source != s.target)
        return tuple(dict.fromkeys(pairs))

    @property
    def own_directions(self) -> tuple[LanguageDirection, ...]:
        """The directions that were trained in this run, without those of its initial run."""
        pairs = ((s.source, s.target) for s in self.streams if s.source != s.target and s.share)
        return tuple(dict.fromkeys(pairs))

    def with_earlier(self, earlier: "TrainedDirections") -> "TrainedDirections":
        """Return this record with the other streams of an earlier one, as streams of share 0."""
        own = {(s.task, s.source, s.target, s.domain) for s in self.streams}
        added = (
            s.model_copy(update={"share": 0.0, "valid_rows": 0, "test_rows": 0})
            for s in earlier.streams
            if (s.task, s.source, s.target, s.domain) not in own
        )
        return replace(self, streams=(*self.streams, *added))

    @property
    def valid_rows(self) -> int:
        """Rows of the validation split of all streams."""
        return sum(s.valid_rows for s in self.streams)

    @property
    def next_command(self) -> str:
        """What scores the run after training: ``eval``, with the split that has rows of a pair."""
        pairs = [s for s in self.streams if s.source != s.target]
        if any(s.test_rows for s in pairs):
            return "eval {run}"
        return "eval {run} --split valid" if any(s.valid_rows for s in pairs) else "report {run}"

    def write(self, path: Path) -> None:
        """Write directions.json, whole or not at all."""
        value = {
            "format": DIRECTIONS_FORMAT,
            "corpus": {"name": self.corpus, "fingerprint": self.fingerprint},
            "streams": [stream.model_dump() for stream in self.streams],
        }
        write_json(path, value)


class _CorpusShape(FileShape):
    name: str
    fingerprint: str


class _DirectionsShape(FileShape):
    kind: ClassVar[FileKind] = DIRECTIONS_FILE
    format: Literal[1]  # DIRECTIONS_FORMAT
    corpus: _CorpusShape
    streams: tuple[TrainedStream, ...]


def read_trained_directions(path: Path) -> TrainedDirections | None:
    """Return the content of directions.json; None where there is none (runs of older versions).

    Raises CheckpointError naming the file if it is damaged.
    """
    if not path.exists():
        return None
    found = _DirectionsShape.read(path)
    return TrainedDirections(
        corpus=found.corpus.name,
        fingerprint=found.corpus.fingerprint,
        streams=found.streams,
    )
