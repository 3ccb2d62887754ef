"""Initialize torch.distributed from the environment that ``torchrun`` sets, with a watchdog."""

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
    """Initialize the default process group, yield its ``World`` and destroy the group at the end.

    Under ``torchrun`` a rank that dies, or does not answer within ``timeout_s``, ends the run on
    every rank with a LostRankError that names it. Outside, the world is a ``SingleProcess``. A
    group that exists already is used and not destroyed, without a watchdog. ``device`` is ``auto``,
    ``cpu`` or ``cuda``. Raises UserError when the environment is incomplete.
    """
    chosen = _select_device(device)
    if distributed.is_available() and distributed.is_initialized():
        yield ProcessGroupWorld(chosen)
        return
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield SingleProcess(chosen)
        return
    rendezvous = _rendezvous(timeout_s)
    FLIGHT_RECORDER.open(rendezvous.watchdog())
    try:
        rendezvous.init_process_group(chosen)
        yield ProcessGroupWorld(chosen)
        # a fast rank must not close connections that others still use
        ProcessGroupWorld(chosen).barrier()
    except BaseException as error:
        named = FLIGHT_RECORDER.report_failure(error)
        if named is not error:
            raise named from error
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
        """Return the watchdog of this rank; a restart uses the same name for its heartbeat file."""
        address = f"{os.environ['MASTER_ADDR']}-{os.environ['MASTER_PORT']}".replace("/", "-")
        name = f"moesaic-{os.getuid()}-{address}-rank-{self.rank}"
        client = distributed.PrefixStore("watchdog", _store(self.timeout, is_master=False))  # pyright: ignore[reportPrivateImportUsage]
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
    """Connect to the rendezvous store, with a prefix of this attempt and number of ranks.

    After a restart by torchrun the agent's store still holds the addresses of the ranks that died;
    without a prefix per attempt gloo connects to those ("connectFullMesh failed"). When a node
    joins or leaves, all ranks restart without a new attempt, hence the number.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(address, port, is_master=is_master, timeout=timeout)  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError as error:
        action = "open" if is_master else "reach"
        raise UserError(
            f"rank {os.environ['RANK']} cannot {action} the rendezvous store at {address}:{port} "
            f"within {timeout.total_seconds():.0f} s: {str(error).partition(chr(10))[0]}. Check "
            "MASTER_ADDR and MASTER_PORT, that rank 0 was started and that no other program uses "
            "the port"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    name = f"attempt-{attempt}-of-{os.environ['WORLD_SIZE']}"
    return distributed.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]


def _select_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name} was requested, but torch finds no CUDA device")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(
            f"local rank {local_rank} needs a GPU of its own, but torch finds {gpus}: start at "
            f"most {gpus} ranks on this machine, or use the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
