"""Machine: memory, rates and latencies of a cluster, each number with its source, read from a file.

A rate that depends on the size of a call is a curve of measured points. What runs at the same time
slows each other down: for a contended pair, ``slow_down`` is the time of both together over that of
the longer one alone, 1 if they overlap fully and 2 if they take turns.
"""

import math
import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError, UserError, did_you_mean
from moesaic.core.file_reader import KIB, FileKind, read_text
from moesaic.core.yaml_reader import read_yaml
from moesaic.parallel.precision import Precision
from moesaic.planner.operation_recorder import OperationKind

MACHINE_FILE = FileKind(name="machine file", max_bytes=256 * KIB, error=ConfigError)
CALIBRATE = "`moesaic calibrate --out machine.yaml` measures it on the machine itself"
PRODUCTS = (OperationKind.DENSE_PRODUCT, OperationKind.GROUPED_PRODUCT)
Positive = Annotated[float, Field(gt=0)]
Source = Annotated[str, Field(min_length=1)]


class Sourced(Config):
    """One positive number and the text that says where it is from."""

    value: Positive
    source: Source


class SlowDown(Config):
    """Time of two kinds of work together over the longer alone, for equal times: 1 to about 2."""

    value: Annotated[float, Field(ge=1)]
    source: Source


class SizedRate(Config):
    """Rate of a kind of call as a function of its size: ``points`` of (size, units per second).

    Between points the time is interpolated in log-log; a call below the smallest takes as long as
    the smallest (the cost of a call), and one above the largest has its rate.
    """

    points: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)]
    source: Source

    @field_validator("points")
    @classmethod
    def _check_order(
        cls, points: tuple[tuple[float, float], ...]
    ) -> tuple[tuple[float, float], ...]:
        sizes = [size for size, _ in points]
        if sizes != sorted(set(sizes)):
            raise ValueError("points must stand in the order of their sizes, each size once")
        return points

    def seconds(self, size: float) -> float:
        """Return the time of one call of this size (FLOPs or bytes). Zero takes no time."""
        sizes, times = self._log_times
        if size <= 0:
            return 0.0
        x = math.log(size)
        place = bisect_right(sizes, x)
        if place == 0:
            return math.exp(times[0])
        if place == len(sizes):
            return math.exp(times[-1] + x - sizes[-1])
        share = (x - sizes[place - 1]) / (sizes[place] - sizes[place - 1])
        return math.exp(times[place - 1] + share * (times[place] - times[place - 1]))

    @cached_property
    def _log_times(self) -> tuple[list[float], list[float]]:
        """Logarithms of sizes and of times; noise must not make a larger call faster."""
        times: list[float] = []
        for size, rate in self.points:
            times.append(max(size / rate, *times[-1:], 0.0))
        return [math.log(size) for size, _ in self.points], [math.log(t) for t in times]


class LinkSpeed(Config):
    """A link: seconds until the first byte, and bytes per second."""

    latency_s: Sourced
    bytes_per_s: Sourced

    def seconds(self, size: float, *, messages: float = 1) -> float:
        """Return the time of ``size`` bytes in so many messages."""
        return messages * self.latency_s.value + size / self.bytes_per_s.value


class Products(Config):
    """Rates of products of one dtype in FLOP/s, by the FLOPs of a call.

    ``peak`` is what MFU is a share of: the data sheet's, or the highest rate that was measured.
    """

    peak: Sourced
    dense: SizedRate
    grouped: SizedRate
    attention: SizedRate


class ContendedPairs(Config):
    """Slow-downs of pairs of work that a step overlaps.

    ``all_devices`` is that of a device's compute while the other devices of its node compute,
    beside what ``SharedCores.memory`` has of it: that of the slowest, for which the others wait.
    """

    all_devices: SlowDown
    product_copy: SlowDown
    copy_copy: SlowDown
    disk_product: SlowDown
    product_collective: SlowDown


class SharedCores(Config):
    """What ranks of a node add to each other's steps where they compute and send on its cores.

    Collectives and ZeRO's units are by the bytes that a rank sends in a call: the wait for a late
    rank, copies and the host's work are in them, and none of it overlaps compute. ``memory`` is
    that of ``Machine`` while all other devices of the node are as busy.
    """

    all_to_all: SizedRate
    all_gather: SizedRate
    all_reduce: SizedRate
    unit_gather: SizedRate
    unit_scatter: SizedRate
    memory: SizedRate

    def collective(self, kind: str) -> SizedRate | None:
        """Return the curve of a kind of collective between layers, or None if it has none."""
        curves: dict[str, SizedRate] = {
            "all-to-all": self.all_to_all,
            "all-gather": self.all_gather,
            "all-reduce": self.all_reduce,
        }
        return curves.get(kind)

    def unit(self, kind: str) -> SizedRate | None:
        """Return the curve of what ZeRO adds to a unit by a kind of collective, or None."""
        return {"all-gather": self.unit_gather, "reduce-scatter": self.unit_scatter}.get(kind)


class Machine(Config):
    """A cluster of equal nodes. Bytes and rates are those of one device, unless they say node.

    ``device`` is PyTorch's type of a device. ``memory`` is the rate of reading and writing device
    memory, by the bytes of a call. ``update`` is that of the optimizer on the host, over all bytes
    that it reads and writes. Without ``shared_cores`` (devices with memory and links of their own)
    collectives take what their link takes, gradient sums overlap compute, and the host's work for
    ZeRO's units is not forecast. ``step_over_parts`` is what memory-bound operations and attention
    take in a step on a processor over their times alone.
    """

    name: Source
    device: Literal["cuda", "cpu"] = "cuda"
    devices_per_node: Sourced
    device_memory: Sourced
    host_memory_per_node: Sourced
    disk_per_node: Sourced
    products: dict[str, Products]
    memory: SizedRate
    within_node: LinkSpeed
    between_nodes: LinkSpeed
    host_to_device: LinkSpeed
    device_to_host: LinkSpeed
    disk_read: LinkSpeed
    disk_write: LinkSpeed
    update: Sourced
    contended: ContendedPairs
    shared_cores: SharedCores | None = None
    step_over_parts: SlowDown | None = None
    price_per_device_hour: Sourced | None = None

    def products_of(self, dtype: str) -> Products:
        """Return the rates of a dtype. Raises ConfigError if the machine has none."""
        if dtype not in self.products:
            known = ", ".join(sorted(self.products)) or "none"
            raise ConfigError(
                [
                    f"machine {self.name}: products.{dtype} is missing (it has {known}): add "
                    f"points of dense and grouped products in {dtype}; {CALIBRATE}"
                ]
            )
        return self.products[dtype]

    def beside_busy_ranks(self) -> "Machine":
        """Return the machine as a rank has it while all others of its node compute."""
        shared = self.shared_cores
        return self.replace(memory=shared.memory) if shared else self

    def compute_factor(self, kind: OperationKind, *, neighbours: bool) -> float:
        """Return what a step's operations of a kind take over the sum of their times.

        With neighbours these are the times of ``beside_busy_ranks``.
        """
        factor = self.contended.all_devices.value if neighbours else 1.0
        if self.step_over_parts is None or kind in PRODUCTS:
            return factor
        return factor * self.step_over_parts.value


def read_machine(path: Path) -> Machine:
    """Read a machine file, YAML or JSON. Raises ConfigError that names each missing number."""
    try:
        return Machine.from_dict(read_yaml(read_text(path, MACHINE_FILE)))
    except ConfigError as error:
        problems = [p if p.startswith(str(path)) else f"{path}: {p}" for p in error.problems]
        missing = any("missing" in problem for problem in problems)
        raise ConfigError([*problems, CALIBRATE] if missing else problems) from error


@dataclass(frozen=True, slots=True)
class DeviceSize:
    """A device's name, its memory in bytes, and PyTorch's type of it."""

    name: str
    memory: float
    type: str


def device_here() -> DeviceSize:
    """Return the first CUDA device of this machine, or its processor with the host's memory."""
    if torch.cuda.is_available():
        return DeviceSize(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], "cuda")
    return DeviceSize("this machine", host_memory_bytes(), "cpu")


def host_memory_bytes() -> float:
    """Return the memory of this machine."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def machine_names() -> tuple[str, ...]:
    """Return the names of the machines that ship with the package."""
    found = files("moesaic.planner").joinpath("machines").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in found if f.name.endswith(".yaml")))


def find_machine(name: str) -> Machine:
    """Return a shipped machine by name, or read a file. Raises ConfigError or UserError."""
    if name in machine_names():
        file = files("moesaic.planner").joinpath("machines", f"{name}.yaml")
        return Machine.from_dict(read_yaml(file.read_text(encoding="utf-8")))
    if Path(name).suffix in (".yaml", ".yml", ".json") or Path(name).exists():
        return read_machine(Path(name))
    raise UserError(
        f'unknown machine "{name}"{did_you_mean(name, machine_names())}: expected one of '
        f"{', '.join(machine_names())}, or a machine file that `moesaic calibrate` wrote"
    )


def dtype_name(precision: Precision) -> str:
    """Return the name of the dtype of matrix products, as in a machine file."""
    return str(precision.compute_dtype).removeprefix("torch.")
