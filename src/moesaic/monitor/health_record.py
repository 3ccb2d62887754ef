"""Health record: the router findings of a run in ``health.json``, with the steps they lasted.

Training writes it, and the report shows it. ``{"format": 1, "findings":
[{"first_step", "last_step", "layer", "rule", "state", "text", "cause", "advice"}]}``, in the order
in which they were found. ``last_step`` is null while a finding lasts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from moesaic.core.errors import DataError
from moesaic.core.file_reader import MAX_INT, MIB, FileKind, FileShape
from moesaic.core.files import write_json
from moesaic.monitor.health_rules import HealthFinding, HealthState

HEALTH_FORMAT = 1
HEALTH_FILE = FileKind(name="record of router findings", max_bytes=16 * MIB, error=DataError)
MAX_FINDINGS = 10_000  # of a file that is read


@dataclass(frozen=True, slots=True)
class RecordedFinding:
    """A finding, as it was first worded, and the steps at which it was found and cleared."""

    finding: HealthFinding
    first_step: int
    last_step: int | None = None


class _FindingShape(FileShape):
    first_step: int = Field(ge=0, le=MAX_INT)
    last_step: int | None = Field(ge=0, le=MAX_INT)
    layer: str
    rule: str
    state: HealthState
    text: str
    cause: str
    advice: str


class _HealthShape(FileShape):
    kind: ClassVar[FileKind] = HEALTH_FILE
    format: Literal[1]  # HEALTH_FORMAT
    findings: tuple[_FindingShape, ...]


def record_findings(
    recorded: Sequence[RecordedFinding], findings: Sequence[HealthFinding], *, step: int
) -> tuple[RecordedFinding, ...]:
    """Return the record after a check: lasting findings kept, cleared ones closed, new ones added.

    New ones are last, in the order given.
    """
    found = {(f.layer, f.rule) for f in findings}
    kept = [
        replace(r, last_step=step) if r.last_step is None and _key(r) not in found else r
        for r in recorded
    ]
    lasting = {_key(r) for r in kept if r.last_step is None}
    new = [RecordedFinding(f, step) for f in findings if (f.layer, f.rule) not in lasting]
    return (*kept, *new)


def up_to_step(recorded: Sequence[RecordedFinding], step: int) -> tuple[RecordedFinding, ...]:
    """Return the record as it was after ``step``, for a run that is resumed there."""
    return tuple(
        replace(r, last_step=None) if r.last_step is not None and r.last_step > step else r
        for r in recorded
        if r.first_step <= step
    )


def write_findings(path: Path, recorded: Sequence[RecordedFinding]) -> None:
    """Write ``health.json`` atomically."""
    rows = [
        {"first_step": r.first_step, "last_step": r.last_step} | asdict(r.finding) for r in recorded
    ]
    write_json(path, {"format": HEALTH_FORMAT, "findings": rows})


def read_findings(path: Path) -> tuple[RecordedFinding, ...]:
    """Read ``health.json``; empty if there is none. Raises DataError if it is not one."""
    if not path.is_file():
        return ()
    return tuple(map(_finding_from_shape, _HealthShape.read(path).findings[:MAX_FINDINGS]))


def _key(recorded: RecordedFinding) -> tuple[str, str]:
    return recorded.finding.layer, recorded.finding.rule


def _finding_from_shape(found: _FindingShape) -> RecordedFinding:
    words = found.model_dump(exclude={"first_step", "last_step"})
    return RecordedFinding(HealthFinding(**words), found.first_step, found.last_step)
