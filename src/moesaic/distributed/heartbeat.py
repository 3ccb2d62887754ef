"""Marks: where a rank is in its work, in a few bytes that outlive its process.

A rank writes its mark at every collective and at every place of a step, some microseconds each. The
bytes lie in a memory-mapped file on its own machine, so after SIGKILL they still say what the rank
did last; a watch (``watch.py``) carries them to other machines.
"""

import os
import struct
import time
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

_HEAD = struct.Struct("<Qdqq?32s48s")  # serial, time, step, slot, inside, op, place
_SLOT = struct.Struct("<64sQ")  # a group's name, its number of collectives
_SLOTS_AT = 128
_BYTES = 8192
_MAX_GROUPS = (_BYTES - _SLOTS_AT) // _SLOT.size
DEFAULT_GROUP = "all"  # the name of the default process group


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank did last.

    ``serial`` grows with every mark. ``counts`` says how many collectives of each group the rank
    has come to; ``op`` is the newest, of ``group``, and ``inside`` whether it is still in there.
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
        """Return the number of the newest collective of ``group`` that the rank came to."""
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
    """The bytes that one rank writes its marks to; without a path they are in memory alone."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._bytes = bytearray(_BYTES) if path is None else _map_file(path)
        self._slots: dict[str, int] = {}
        self._numbers: list[int] = []
        self._serial, self._step = 0, 0
        self._slot, self._in_collective = -1, False
        self._op, self._phase = b"", b""

    def mark_phase(self, phase: str, *, step: int | None = None) -> None:
        """Note a place of the step; ``step`` None stays at the same step."""
        self._phase = phase.encode()
        self._step = self._step if step is None else step
        self._write()

    def begin_collective(self, op: str, *, group: str) -> None:
        """Note that this rank comes to the group's next collective."""
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
        """Note that the collective is done."""
        self._in_collective = False
        self._write()

    def read(self) -> Heartbeat:
        """Return the newest mark."""
        return _unpack_heartbeat(self._bytes)

    def close(self) -> None:
        """Remove the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._serial += 1
        _HEAD.pack_into(
            self._bytes,
            0,
            self._serial,
            time.time(),
            self._step,
            self._slot,
            self._in_collective,
            self._op,
            self._phase,
        )


def read_heartbeat_file(path: Path) -> Heartbeat | None:
    """Return the newest mark of another rank of this machine; None if its file cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return _unpack_heartbeat(content) if len(content) == _BYTES else None


def _unpack_heartbeat(content: bytes | bytearray | mmap) -> Heartbeat:
    serial, time_s, step, slot, inside, op, place = _HEAD.unpack_from(content, 0)
    counts = {}
    for index in range(_MAX_GROUPS):
        name, number = _SLOT.unpack_from(content, _SLOTS_AT + index * _SLOT.size)
        if not number:
            break
        counts[_decode_field(name)] = number
    group = list(counts)[slot] if 0 <= slot < len(counts) else DEFAULT_GROUP
    return Heartbeat(
        serial, time_s, step, _decode_field(place), _decode_field(op), group, inside, counts
    )


def _decode_field(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


def _map_file(path: Path) -> mmap:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    handle = os.open(path, flags, 0o600)
    try:
        os.ftruncate(handle, _BYTES)
        return mmap(handle, _BYTES)
    finally:
        os.close(handle)
