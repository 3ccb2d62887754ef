"""Heartbeat of a rank: its latest phase and collective, in a memory-mapped file.

A rank writes its heartbeat at every collective and at every phase of a step, some microseconds
each. The file outlives the process: after SIGKILL it still holds what the rank did last. The
watchdog (``watchdog.py``) posts it to other machines.
"""

import os
import struct
import time
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

_HEAD = struct.Struct("<Qdqq?32s48s")  # serial, time, step, slot, in_collective, op, phase
_SLOT = struct.Struct("<64sQ")  # a group's name, its number of collectives
_SLOTS_AT = 128
_BYTES = 8192
_MAX_GROUPS = (_BYTES - _SLOTS_AT) // _SLOT.size
DEFAULT_GROUP = "all"  # the name of the default process group


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank did last.

    ``serial`` grows with every write. ``collective_counts`` holds how many collectives of each
    group the rank has entered; ``op`` is the newest, of ``group``, and ``in_collective`` is true
    until it ends.
    """

    serial: int = 0
    time_s: float = 0.0
    step: int = 0
    phase: str = ""
    op: str = ""
    group: str = DEFAULT_GROUP
    in_collective: bool = False
    collective_counts: dict[str, int] | None = None

    def collectives_entered(self, group: str) -> int:
        """Return the number of collectives of ``group`` that the rank has entered."""
        return (self.collective_counts or {}).get(group, 0)

    @property
    def sequence_number(self) -> int:
        return self.collectives_entered(self.group)

    @property
    def collective_text(self) -> str:
        """``all_reduce #118 (step 7, sum of gradients)``."""
        return f"{self.op} #{self.sequence_number} ({self.phase_text})"

    @property
    def phase_text(self) -> str:
        """``step 7, sum of gradients``."""
        step = f"step {self.step}, " if self.step else ""
        return step + (self.phase or "at the start")


class HeartbeatFile:
    """The file that one rank writes its heartbeat to; without a path it is in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._bytes = bytearray(_BYTES) if path is None else _map_file(path)
        self._slots: dict[str, int] = {}
        self._numbers: list[int] = []
        self._serial, self._step = 0, 0
        self._slot, self._in_collective = -1, False
        self._op, self._phase = b"", b""

    def mark_phase(self, phase: str, *, step: int | None = None) -> None:
        """Record the phase that begins; ``step`` None means the same step."""
        self._phase = phase.encode()
        self._step = self._step if step is None else step
        self._write()

    def begin_collective(self, op: str, *, group: str) -> None:
        """Record that this rank enters the group's next collective."""
        slot = self._slots.get(group)
        if slot is None:
            slot = self._slots[group] = min(len(self._numbers), _MAX_GROUPS - 1)
            self._numbers.append(0)
        self._numbers[slot] += 1
        _SLOT.pack_into(
            self._bytes, _SLOTS_AT + slot * _SLOT.size, group.encode()[:64], self._numbers[slot]
        )
        self._slot, self._op, self._in_collective = slot, op.encode(), True
        self._write()

    def end_collective(self) -> None:
        """Record the end of the collective."""
        self._in_collective = False
        self._write()

    def read(self) -> Heartbeat:
        """Return the newest heartbeat."""
        return _unpack_heartbeat(self._bytes)

    def close(self) -> None:
        """Remove the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._serial += 1
        fields = (self._step, self._slot, self._in_collective, self._op, self._phase)
        _HEAD.pack_into(self._bytes, 0, self._serial, time.time(), *fields)


def read_heartbeat_file(path: Path) -> Heartbeat | None:
    """Return the newest heartbeat of another rank of this machine; None if it is unreadable."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return _unpack_heartbeat(content) if len(content) == _BYTES else None


def _unpack_heartbeat(content: bytes | bytearray | mmap) -> Heartbeat:
    serial, time_s, step, slot, in_collective, op, phase = _HEAD.unpack_from(content, 0)
    counts = {}
    for index in range(_MAX_GROUPS):
        name, count = _SLOT.unpack_from(content, _SLOTS_AT + index * _SLOT.size)
        if not count:
            break
        counts[_decode_field(name)] = count
    group = list(counts)[slot] if 0 <= slot < len(counts) else DEFAULT_GROUP
    return Heartbeat(
        serial, time_s, step, _decode_field(phase), _decode_field(op), group, in_collective, counts
    )


def _decode_field(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


def _map_file(path: Path) -> mmap:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        os.ftruncate(descriptor, _BYTES)
        return mmap(descriptor, _BYTES)
    finally:
        os.close(descriptor)
