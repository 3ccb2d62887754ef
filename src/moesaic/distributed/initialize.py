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

from moesaic.core.errors import UserError, printable
from moesaic.distributed.bounded_store import BoundedCaller, UnansweredError
from moesaic.distributed.flight_recorder import FLIGHT_RECORDER, record_collective
from moesaic.distributed.heartbeat import HeartbeatFile
from moesaic.distributed.watchdog import Watchdog
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World

_REQUIRED_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MAX_RANKS, _MAX_DIGITS = 2**20, 10
_START_HINT = (
    "start with `torchrun --nproc-per-node N -m moesaic train ...`, or unset RANK and WORLD_SIZE"
)


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
    rendezvous = _Rendezvous.from_environment(timeout_s)
    store = rendezvous.connect(is_master=rendezvous.serves_store and rendezvous.rank == 0)
    FLIGHT_RECORDER.open(rendezvous.watchdog())
    try:
        rendezvous.init_process_group(chosen, store=store)
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
    """What the environment says of this rank.

    ``serves_store``: rank 0 serves the rendezvous store; else the launcher does.
    """

    rank: int
    size: int
    address: str
    port: int
    timeout: timedelta
    serves_store: bool

    @classmethod
    def from_environment(cls, timeout_s: float) -> "_Rendezvous":
        """Read and check the variables that torchrun sets. Raises UserError."""
        missing = [name for name in _REQUIRED_ENV if name not in os.environ]
        if missing:
            raise UserError(
                f"the environment names a rank but not {', '.join(missing)}: {_START_HINT}"
            )
        size = _environment_number("WORLD_SIZE", 1, _MAX_RANKS)
        rank = _environment_number("RANK", 0, size - 1)
        _environment_number("LOCAL_RANK", 0, size - 1)
        agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(
            rank,
            size,
            os.environ["MASTER_ADDR"],
            _environment_number("MASTER_PORT", 1, 2**16 - 1),
            timedelta(seconds=timeout_s),
            serves_store=not agent_store,
        )

    def init_process_group(
        self,
        device: torch.device,
        *,
        store: distributed.Store,  # pyright: ignore[reportPrivateImportUsage]
    ) -> None:
        backend = "nccl" if device.type == "cuda" else "gloo"
        with record_collective("join"):
            self._require_same_device(store, device.type)
            distributed.init_process_group(
                backend,
                store=store,
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
            )

    def _require_same_device(
        self,
        store: distributed.Store,  # pyright: ignore[reportPrivateImportUsage]
        device: str,
    ) -> None:
        """Raise UserError where rank 0 computes on another kind of device."""
        if self.rank == 0:
            store.set("device", device)
            return
        first = store.get("device").decode()
        if first != device:
            raise UserError(
                f"rank {self.rank} computes on {device}, but rank 0 on {first}: give every rank a "
                "GPU, or start all of them with the device cpu"
            )

    def watchdog(self) -> Watchdog:
        """Return the watchdog of this rank; a restart uses the same name for its heartbeat file."""
        address = f"{self.address}-{self.port}".replace("/", "-")
        name = f"moesaic-{os.getuid()}-{address}-rank-{self.rank}"
        return Watchdog(
            distributed.PrefixStore("watchdog", self.connect(is_master=False)),  # pyright: ignore[reportPrivateImportUsage]
            rank=self.rank,
            size=self.size,
            timeout_s=self.timeout.total_seconds(),
            heartbeat_file=HeartbeatFile(Path(tempfile.gettempdir()) / name),
            store_rank=0 if self.serves_store else None,
        )

    def connect(self, *, is_master: bool) -> distributed.Store:  # pyright: ignore[reportPrivateImportUsage]
        """Connect to the rendezvous store, with a prefix of this attempt and number of ranks.

        After a restart by torchrun the agent's store still holds the addresses of the ranks that
        died; without a prefix per attempt gloo connects to those ("connectFullMesh failed"). When a
        node joins or leaves, all ranks restart without a new attempt, hence the number. Raises
        UserError.
        """
        seconds = self.timeout.total_seconds()
        # something else may listen at the port: the client would wait for its greeting forever
        call = BoundedCaller(limit_s=seconds + 1.0, name="store connection")
        try:
            store = call(
                lambda: distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                    self.address, self.port, is_master=is_master, timeout=self.timeout
                )
            )
        except (RuntimeError, UnansweredError) as error:
            action = "open" if is_master else "reach"
            raise UserError(
                f"rank {self.rank} cannot {action} the rendezvous store at "
                f"{self.address}:{self.port} within {seconds:.0f} s: "
                f"{str(error).partition(chr(10))[0]}. Check MASTER_ADDR and MASTER_PORT, that rank "
                "0 was started and that no other program uses the port"
            ) from error
        finally:
            call.close()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return distributed.PrefixStore(f"attempt-{attempt}-of-{self.size}", store)  # pyright: ignore[reportPrivateImportUsage]


def _environment_number(name: str, low: int, high: int) -> int:
    """Return an environment variable as a number from ``low`` to ``high``. Raises UserError."""
    text = os.environ[name]
    is_number = text.isascii() and text.isdigit() and len(text) < _MAX_DIGITS
    if not is_number or not low <= int(text) <= high:
        raise UserError(
            f'the environment variable {name}: found "{printable(text, limit=40)}", expected a '
            f"whole number from {low} to {high}: {_START_HINT}"
        )
    return int(text)


def _select_device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name} was requested, but torch finds no CUDA device")
    gpus = torch.cuda.device_count()
    local_rank = (
        _environment_number("LOCAL_RANK", 0, _MAX_RANKS) if "LOCAL_RANK" in os.environ else 0
    )
    if local_rank >= gpus:
        raise UserError(
            f"local rank {local_rank} needs a GPU of its own, but torch finds {gpus}: start at "
            f"most {gpus} ranks on this machine, or use the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
