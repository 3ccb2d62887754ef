"""Metric writers: JSON lines (``metrics.jsonl``, the complete record) and TensorBoard.

A row is one step and its values by name (``train/loss``, ``perf/tokens_per_s``, ``moe/max_vio``).
"""

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from moesaic.core.config_errors import show_value
from moesaic.core.errors import DataError, UserError, printable
from moesaic.core.file_reader import MIB, FileKind, iter_lines, parse_json
from moesaic.core.files import make_dir, os_errors_named

METRICS_FILE = FileKind(
    name="metrics file (a JSON mapping per line)",
    max_bytes=4096 * MIB,
    max_line=MIB,
    max_values=100_000,
    error=DataError,
    way_out="remove the line, or the file",
)
NOT_JSON_NUMBERS = ("NaN", "Infinity", "-Infinity")
MetricRow = Mapping[str, float]


@runtime_checkable
class MetricWriter(Protocol):
    """Writes one row per step, in order."""

    def write(self, step: int, *, values: MetricRow) -> None: ...

    def flush(self) -> None:
        """Return when all rows are on disk."""
        ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object per line: ``{"step": 40, "train/loss": 3.2, ...}``.

    Values that JSON lacks are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``. Opening
    removes an incomplete last line of a killed process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_dir(path.parent)
        with os_errors_named(path, action="cannot be written"):
            path.touch()
            _truncate_rows(path, after=math.inf)
            self._stream = path.open("ab")

    def write(self, step: int, *, values: MetricRow) -> None:
        row = {"step": step} | {name: _to_json_number(value) for name, value in values.items()}
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        with os_errors_named(self.path, action="cannot be written"):
            self._stream.write(text.encode() + b"\n")

    def flush(self) -> None:
        with os_errors_named(self.path, action="cannot be written"):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        if not self._stream.closed:
            self.flush()
            self._stream.close()

    def truncate_after(self, step: int) -> None:
        """Delete the rows of later steps: a resumed run writes them again."""
        self.flush()
        _truncate_rows(self.path, after=step)


class TensorBoardWriter:
    """TensorBoard event files. Raises UserError where TensorBoard is not installed.

    ``purge_after`` hides the rows of an earlier process for later steps.
    """

    def __init__(self, directory: Path, *, purge_after: int | None = None) -> None:
        try:
            module: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise UserError(
                f"TensorBoard output was requested ({directory}) but it is not installed. Install "
                'it with pip install "moesaic[tb]", or leave it off: metrics.jsonl has every row.'
            ) from error
        purge = None if purge_after is None else purge_after + 1
        self._writer = module.SummaryWriter(str(directory), purge_step=purge)

    def write(self, step: int, *, values: MetricRow) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MultiWriter:
    """Several writers as one; without writers it discards all rows."""

    def __init__(self, writers: Sequence[MetricWriter] = ()) -> None:
        self.writers = tuple(writers)

    def write(self, step: int, *, values: MetricRow) -> None:
        for writer in self.writers:
            writer.write(step, values=values)

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Yield the rows of a ``metrics.jsonl``, also while a run appends to it.

    Every value is a number; every row has a ``step``. Raises DataError for a complete line that is
    no such row, or that is too long.
    """
    for offset, line in iter_lines(path, METRICS_FILE):
        if line.endswith(b"\n"):
            yield _parse_row(line, where=f"{path}: row at byte {offset}")


def _truncate_rows(path: Path, *, after: float) -> None:
    """Delete rows of steps past ``after``, and anything after the last complete line."""
    end = 0
    for offset, line in iter_lines(path, METRICS_FILE):
        row = _parse_row(line, where=path) if line.endswith(b"\n") else None
        if row is None or row["step"] > after:
            break
        end = offset + len(line)
    with path.open("r+b") as stream:
        stream.truncate(end)
        os.fsync(stream.fileno())


def _parse_row(line: bytes, *, where: Path | str) -> dict[str, float]:
    row = parse_json(line, kind=METRICS_FILE, where=where)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise METRICS_FILE.problem(where, f"found {show_value(row)}, expected a row with its step")
    return {name: _number(name, value, where=where) for name, value in row.items()}


def _number(name: str, value: object, *, where: Path | str) -> float:
    if isinstance(value, str) and value in NOT_JSON_NUMBERS:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        found = f"{printable(name)}: found {show_value(value)}, expected a number"
        raise METRICS_FILE.problem(where, found)
    return value


def _to_json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
