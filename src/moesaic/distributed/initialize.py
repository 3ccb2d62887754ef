"""Joining and leaving a group of ranks, from the environment that ``torchrun`` sets."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed

from moesaic.core.errors import UserError
from moesaic.distributed.flight_recorder import FLIGHT_RECORDER, record_collective
from moesaic.distributed.heartbeat import HeartbeatFile
from moesaic.distributed.watchdog import Watchdog
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World

_REQUIRED_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def init_distributed(*, timeout_s: float = 120.0, device: str = "auto") -> Iterator[World]:
    """Give this process its ``World`` and leave it cleanly at the end.

    Under ``torchrun`` the ranks meet in one group; a rank that dies, or does not answer within
    ``timeout_s``, ends the run on every rank with a LostRankError that names it. Outside, the world
    is ``SingleProcess``. A group that exists already is used and left as it is, and nobody watches it.
    ``device`` is ``auto``, ``cpu`` or ``cuda``. Raises UserError when the environment is half set.
    """
    chosen = _select_device(device)
    if distributed.is_available() and distributed.is_initialized():
        yield ProcessGroupWorld(chosen)
        return
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield SingleProcess(chosen)
        return
    meeting = _rendezvous(timeout_s)
    FLIGHT_RECORDER.open(meeting.watchdog())
    try:
        meeting.init_process_group(chosen)
        yield ProcessGroupWorld(chosen)
        # without this a quick rank tears its connections down while others still use them
        ProcessGroupWorld(chosen).barrier()
    except BaseException as error:
        better = FLIGHT_RECORDER.report_failure(error)
        if better is not error:
            raise better from error
        raise
    finally:
        FLIGHT_RECORDER.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()


@dataclass(frozen=True, slots=True)
class _Rendezvous:
    rank: int
    size: int
    timeout: timedelta
    store: distributed.Store  # pyright: ignore[reportPrivateImportUsage]

    def init_process_group(self, device: torch.device) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        with record_collective("join"):
            distributed.init_process_group(
                backend,
                store=self.store,
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
            )

    def watchdog(self) -> Watchdog:
        """Return the watch of this rank; its book has a name that a restart uses again."""
        address = f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}".replace("/", "-")
        name = f"moesaic-{os.getuid()}-{address}-rank-{self.rank}"
        client = distributed.PrefixStore("watch", _store(self.timeout, is_master=False))  # pyright: ignore[reportPrivateImportUsage]
        return Watchdog(
            client,
            rank=self.rank,
            size=self.size,
            timeout_s=self.timeout.total_seconds(),
            heartbeat_file=HeartbeatFile(Path(tempfile.gettempdir()) / name),
        )


def _rendezvous(timeout_s: float) -> _Rendezvous:
    missing = [name for name in _REQUIRED_ENV if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment names a rank but not {', '.join(missing)}: start with "
            "`torchrun --nproc-per-node N -m moesaic train ...`, or unset RANK and WORLD_SIZE"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _Rendezvous(rank, size, timeout, _store(timeout, is_master=rank == 0 and not shared))


def _store(timeout: timedelta, *, is_master: bool) -> distributed.Store:  # pyright: ignore[reportPrivateImportUsage]
    """Meet under a name of this attempt, and of this number of ranks.

    After ``torchrun --max-restarts`` the agent's store still holds the addresses of the ranks that
    died; without a prefix per attempt gloo connects to those ("connectFullMesh failed"). A node
    that joins or leaves starts all ranks anew without a new attempt, hence the number.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(address, port, is_master=is_master, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError as error:
        what = "open the store of this run" if is_master else "reach the store that all meet in"
        raise UserError(
            f"rank {os.environ['RANK']} cannot {what} at {address}:{port}, within "
            f"{timeout.total_seconds():.0f} s: {str(error).partition(chr(10))[0]}. Check "
            "MASTER_ADDR and MASTER_PORT, that rank 0 was started and that no other program has "
            "the port"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"attempt-{attempt}-of-{os.environ['WORLD_SIZE']}"
    return distributed.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]


def _select_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name} was asked for, but torch sees no CUDA device here")
    local, seen = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= seen:
        raise UserError(
            f"rank {local} of this machine needs a GPU of its own, but torch sees {seen}: start "
            f"at most {seen} ranks here, or use the CPU"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
