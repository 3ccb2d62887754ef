"""Trained directions: what a run was trained on, as ``directions.json`` in its run directory.

Written when training starts, from the streams of the data mixture. Evaluation scores these
directions, and translation warns about others, without opening the corpus. The file::

    {"format": 1, "corpus": {"name": "mine", "fingerprint": "<sha256>"},
     "streams": [{"task": "translation", "source": "deu_Latn", "target": "eng_Latn",
                  "rows": 240, "valid_rows": 12, "test_rows": 13, "share": 0.9}, ...]}

A stream whose source and target are one language is no translation (denoising, language models).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesaic.core.errors import CheckpointError
from moesaic.core.files import read_json, write_json

DIRECTIONS_FORMAT = 1
LanguageDirection = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedStream:
    """Rows of one task in one direction; ``share`` is their expected share of the samples."""

    task: str
    source: str
    target: str
    rows: int
    valid_rows: int
    test_rows: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedDirections:
    """The streams of a run, and the corpus that they are of (its name and fingerprint)."""

    corpus: str
    fingerprint: str
    streams: tuple[TrainedStream, ...]

    @property
    def directions(self) -> tuple[LanguageDirection, ...]:
        """The directions of translation (source, target), in the order of the streams."""
        pairs = ((s.source, s.target) for s in self.streams if s.source != s.target)
        return tuple(dict.fromkeys(pairs))

    @property
    def text_languages(self) -> tuple[str, ...]:
        """The languages whose text was trained on alone, by denoising or language modelling."""
        return tuple(dict.fromkeys(s.source for s in self.streams if s.source == s.target))

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
            "streams": [asdict(stream) for stream in self.streams],
        }
        write_json(path, value)


def read_trained_directions(path: Path) -> TrainedDirections | None:
    """Return the content of directions.json; None where there is none (runs of older versions).

    Raises CheckpointError naming the file if it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return _from_json(read_json(path))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a record of trained directions ({error}); delete it, and the "
            "directions are read from config.yaml and the corpus"
        ) from error


def _from_json(value: Any) -> TrainedDirections:
    if not isinstance(value, Mapping) or value.get("format") != DIRECTIONS_FORMAT:
        found = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"found format {found}, expected {DIRECTIONS_FORMAT}")
    corpus, streams = value["corpus"], value["streams"]
    return TrainedDirections(
        corpus=_text(corpus["name"]),
        fingerprint=_text(corpus["fingerprint"]),
        streams=tuple(_streams(streams)),
    )


def _streams(rows: Any) -> Iterable[TrainedStream]:
    if not isinstance(rows, list):
        raise TypeError(f"streams: expected a list, found {type(rows).__name__}")
    for row in rows:
        numbers = {name: row[name] for name in ("rows", "valid_rows", "test_rows", "share")}
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{name}: expected a number, found {number!r}")
        texts = {name: _text(row[name]) for name in ("task", "source", "target")}
        yield TrainedStream(**texts, **numbers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r:.40}")
    return value
