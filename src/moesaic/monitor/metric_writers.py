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

from moesaic.core.errors import UserError

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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        _truncate_rows(path, after=math.inf)
        self._stream = path.open("ab")

    def write(self, step: int, *, values: MetricRow) -> None:
        row = {"step": step} | {name: _to_json_number(value) for name, value in values.items()}
        self._stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
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
    """Yield the rows of a ``metrics.jsonl``, also while a run appends to it."""
    with path.open("rb") as stream:
        for line in stream:
            row = _parse_row(line)
            if row is not None:
                yield {name: float(v) if isinstance(v, str) else v for name, v in row.items()}


def _truncate_rows(path: Path, *, after: float) -> None:
    """Delete rows of steps past ``after``, and anything after the last complete line."""
    end = 0
    with path.open("r+b") as stream:
        for line in stream:
            row = _parse_row(line)
            if not line.endswith(b"\n") or (row is not None and row.get("step", 0) > after):
                break
            end += len(line)
        stream.truncate(end)
        os.fsync(stream.fileno())


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _to_json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
