"""Calibration: measure this machine in under a minute and write its machine file and receipts."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.machine_info import git_commit, machine_info
from moesaic.core.freed_memory import keep_freed_memory
from moesaic.planner.machine import (
    ContendedPairs,
    LinkSpeed,
    Machine,
    Products,
    SharedCores,
    SizedRate,
    SlowDown,
    Sourced,
    host_memory_bytes,
)
from moesaic.planner.measured_ranks import MEMORY_SIZES, RankTimings, measure_ranks
from moesaic.planner.measured_rates import (
    Measurement,
    Stopwatch,
    attention,
    contended_calls,
    copy,
    dense_product,
    disk,
    grouped_product,
    memory_bound,
    optimizer_update,
)
from moesaic.planner.synthetic_steps import (
    MIDDLE,
    beside_memory_curve,
    memory_over_parts,
    step_call,
    synthetic_step,
)

FULL_POINT_S, QUICK_POINT_S = 0.1, 0.02
FULL_ROUNDS, QUICK_ROUNDS = 3, 1  # of calls on one device
COPY_SIZES = (2**14, 2**20, 2**25)
DTYPES = (torch.float32, torch.bfloat16)
Timings = Mapping[str, Sequence[Measurement]]  # by what is timed


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measured machine, with every timing that it was made of."""

    machine: Machine
    measurements: tuple[Measurement, ...]
    seconds: float

    def receipts(self) -> dict[str, Any]:
        """Return hardware, versions and raw timings as JSON data."""
        timings = [
            {
                "what": m.what,
                "size": m.size,
                "median_s": m.median,
                "spread": round(m.spread, 3),
                "seconds": [float(f"{s:.4g}") for s in m.seconds],
            }
            for m in self.measurements
        ]
        about = {"machine": machine_info(), "commit": git_commit()}
        return about | {"seconds": round(self.seconds, 1), "timings": timings}


def calibrate(
    *,
    quick: bool = False,
    folder: Path | None = None,
    like: Machine | None = None,
    name: str | None = None,
    notify: Callable[[str], object] = lambda _: None,
) -> Calibration:
    """Measure this machine: its first CUDA device, or its processor.

    ``quick`` takes a few seconds instead of under a minute. ``folder`` is where the disk is
    measured. What this machine cannot measure (links between nodes; collectives of one GPU) is
    taken from ``like``, or set equal to what is nearest, and its source is that. ``name`` is that
    of the machine; None: of its device.
    """
    started = time.perf_counter()
    cuda = torch.cuda.device_count() > 0
    if not cuda:
        keep_freed_memory()  # as training does
    sizes = torch.cuda.device_count() if cuda else 2
    point_s, rounds = (QUICK_POINT_S, QUICK_ROUNDS) if quick else (FULL_POINT_S, FULL_ROUNDS)
    run = _Run(point_s, rounds, cuda=cuda, notify=notify)
    # first: ranks are forked, which must be before this process starts threads or CUDA
    ranks = measure_ranks(point_s=run.point_s, cuda=cuda) if sizes > 1 else RankTimings([], {}, {})
    run.keep("two ranks", *ranks.pairs.values())
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fastest = fastest_of(_device_calls(run.watch, cuda=cuda), rounds=run.rounds)
        machine = _measure_machine(run, fastest, ranks=ranks, scratch=Path(scratch), like=like)
    machine = _with_step_over_parts(machine, run, fastest["steps"])
    machine = machine.replace(name=name or machine.name)
    return Calibration(machine, tuple(run.kept), time.perf_counter() - started)


class _Run:
    """The measurements of a calibration, in order."""

    def __init__(
        self, point_s: float, rounds: int, *, cuda: bool, notify: Callable[[str], object]
    ) -> None:
        self.point_s, self.rounds = point_s, rounds
        self.cuda, self._notify = cuda, notify
        self.kept: list[Measurement] = []

    @property
    def watch(self) -> Stopwatch:
        return Stopwatch(torch.device("cuda" if self.cuda else "cpu"), self.point_s)

    @property
    def source(self) -> str:
        device = torch.cuda.get_device_name() if self.cuda else machine_info()["processor"]
        return f"measured by moesaic calibrate, {time.strftime('%Y-%m-%d')}, {device}"

    def keep(self, what: str, *found: Measurement) -> tuple[Measurement, ...]:
        """Keep measurements for the receipts."""
        self._notify(what)
        self.kept += found
        return found

    def curve(self, what: str, found: Sequence[Measurement]) -> SizedRate:
        """Return the rates by size of some measurements."""
        self.keep(what, *found)
        points = sorted((m.size, m.rate) for m in found)
        return SizedRate(points=tuple(points), source=self.source)

    def link(self, what: str, found: Sequence[Measurement]) -> LinkSpeed:
        """Return latency and rate: of the smallest and of the largest size."""
        self.keep(what, *found)
        small, large = min(m.size for m in found), max(m.size for m in found)
        latency = statistics.median(m.median for m in found if m.size == small)
        longest = statistics.median(m.median for m in found if m.size == large)
        rate = large / max(longest - latency, longest / 10)
        return LinkSpeed(latency_s=self.number(latency), bytes_per_s=self.number(rate))

    def number(self, value: float) -> Sourced:
        """Return a measured number with its source."""
        return Sourced(value=float(f"{value:.4g}"), source=self.source)

    def slow_down(self, found: Measurement) -> SlowDown:
        """Return the slow-down of a contended pair."""
        return self.at_least_one(1 / found.rate)

    def at_least_one(self, value: float) -> SlowDown:
        """Return a slow-down; noise must not make it a gain."""
        return SlowDown(value=round(max(1.0, value), 3), source=self.source)


def _measure_machine(
    run: _Run,
    fastest: Timings,
    *,
    ranks: RankTimings,
    scratch: Path,
    like: Machine | None,
) -> Machine:
    watch = run.watch
    pairs = contended_calls(watch, scratch)
    run.keep("contended pairs", *pairs.values())
    measured = _links(run, scratch)
    (call,) = run.keep("calls within a step", *fastest["calls"])
    memory = within_step(fastest["memory"], call=call, asynchronous=run.cuda)
    update = optimizer_update(watch, values=2**22)
    run.keep("optimizer update", update)
    within = run.link("collectives", ranks.link) if ranks.link else _borrowed(like, measured)
    pairs |= ranks.pairs
    slow = {name: run.slow_down(found) for name, found in pairs.items()}
    slow.setdefault("product_collective", slow["product_copy"])
    slow.setdefault("all_devices", SlowDown(value=1, source="there is one device"))
    devices = max(1, torch.cuda.device_count()) if run.cuda else 2  # on a CPU ranks share memory
    device_bytes = torch.cuda.mem_get_info()[1] if run.cuda else host_memory_bytes() // devices
    return Machine(
        name=torch.cuda.get_device_name() if run.cuda else "this machine",
        device="cuda" if run.cuda else "cpu",
        devices_per_node=run.number(devices),
        device_memory=run.number(device_bytes),
        host_memory_per_node=run.number(host_memory_bytes()),
        disk_per_node=run.number(shutil.disk_usage(scratch).free),
        products=_products(run, fastest),
        memory=run.curve("memory-bound operations", memory),
        within_node=within,
        between_nodes=like.between_nodes if like else _same(within, "within_node"),
        host_to_device=measured["host_to_device"],
        device_to_host=measured["device_to_host"],
        disk_read=measured["disk_read"],
        disk_write=measured["disk_write"],
        update=run.number(update.rate),
        contended=ContendedPairs(**slow),
        shared_cores=_shared_cores(run, ranks, call=call) if ranks.shared else None,
        price_per_device_hour=like.price_per_device_hour if like else None,
    )


def _links(run: _Run, scratch: Path) -> dict[str, LinkSpeed]:
    watch = run.watch
    links = {
        "host_to_device": [copy(watch, size=n, to_device=True) for n in COPY_SIZES],
        "device_to_host": [copy(watch, size=n, to_device=False) for n in COPY_SIZES],
        "disk_read": [disk(watch, scratch, size=n, write=False) for n in COPY_SIZES],
        "disk_write": [disk(watch, scratch, size=n, write=True) for n in COPY_SIZES],
    }
    return {name: run.link(name.replace("_", " "), found) for name, found in links.items()}


def _with_step_over_parts(machine: Machine, run: _Run, steps: Sequence[Measurement]) -> Machine:
    """Return the machine with what synthetic steps, if any were timed, take over their parts."""
    if not steps:
        return machine
    over = memory_over_parts(run.keep("synthetic steps", *steps), machine=machine)
    machine = machine.replace(step_over_parts=run.at_least_one(over))
    pairs = machine.contended
    curve = beside_memory_curve(pairs.all_devices.value, machine=machine)
    return machine.replace(contended=pairs.replace(all_devices=run.at_least_one(curve)))


def _shared_cores(run: _Run, ranks: RankTimings, *, call: Measurement) -> SharedCores:
    found = dict(ranks.shared)
    found["memory"] = within_step(found["memory"], call=call, asynchronous=run.cuda)
    curves = {
        kind.replace("-", "_"): run.curve(f"{kind} of ranks that share cores", each)
        for kind, each in found.items()
    }
    return SharedCores(**curves)


def _device_calls(watch: Stopwatch, *, cuda: bool) -> dict[str, list[Callable[[], Measurement]]]:
    """Return what is timed on one device, by name."""
    # a step has more rows than columns
    shapes = ((64, 64), (256, 64), (1024, 128), (1024, 256), (1024, 512))
    # up to 512 rows of an expert, as in training, where rows fill the near caches before weights do
    grouped = ((128, 64), (512, 64), (1024, 96), (3072, 128), (2048, 256), (4096, 256))
    if cuda:
        shapes = ((256, 512), (1024, 1024), (4096, 2048), (8192, 4096), (8192, 8192))
        grouped = tuple((2 * rows, dim) for rows, dim in shapes)
    calls: dict[str, list[Callable[[], Measurement]]] = {
        "calls": [partial(step_call, watch)],
        "memory": [partial(memory_bound, watch, size=n) for n in MEMORY_SIZES],
        "steps": [] if cuda else [partial(synthetic_step, watch, each) for each in MIDDLE],
    }
    for dtype in DTYPES:
        calls |= {
            f"dense products in {dtype}": [
                partial(dense_product, watch, rows=r, dim=d, dtype=dtype) for r, d in shapes
            ],
            f"grouped products in {dtype}": [
                partial(grouped_product, watch, tokens=n, dim=d, dtype=dtype) for n, d in grouped
            ],
            f"attention in {dtype}": [
                partial(attention, watch, tokens=n, dtype=dtype) for n in (32, 128, 512)
            ],
        }
    return calls


def _products(run: _Run, fastest: Timings) -> dict[str, Products]:
    found: dict[str, Products] = {}
    for dtype in DTYPES:
        kinds = (
            f"{kind} in {dtype}" for kind in ("dense products", "grouped products", "attention")
        )
        dense, grouped, mixed = (run.curve(kind, fastest[kind]) for kind in kinds)
        peak = run.number(max(rate for _, rate in dense.points))
        found[str(dtype).removeprefix("torch.")] = Products(
            peak=peak, dense=dense, grouped=grouped, attention=mixed
        )
    return found


def fastest_of(
    calls: Mapping[str, Sequence[Callable[[], Measurement]]], *, rounds: int
) -> dict[str, list[Measurement]]:
    """Measure all, so many times over; return the fastest of each.

    What else a shared host does only makes a call slower, for some seconds, so equal calls are not
    timed one after the other.
    """
    timed = [[[call() for call in each] for each in calls.values()] for _ in range(rounds)]
    return {
        name: [min(same, key=lambda m: m.median) for same in zip(*found, strict=True)]
        for name, found in zip(calls, zip(*timed, strict=True), strict=True)
    }


def within_step(
    loops: Sequence[Measurement], *, call: Measurement, asynchronous: bool
) -> list[Measurement]:
    """Return timings of loops of one operation with the cost of a call within a step.

    A loop's calls, which the smallest size shows, cost less than those of different operations. A
    device that runs ``asynchronous`` to its calls takes the longer of call and work.
    """
    in_loop = min(found.median for found in loops)
    more = max(0.0, call.median - in_loop)
    return [
        replace(
            found,
            seconds=tuple(max(call.median, s) if asynchronous else s + more for s in found.seconds),
        )
        for found in loops
    ]


def _borrowed(like: Machine | None, measured: dict[str, LinkSpeed]) -> LinkSpeed:
    if like is not None:
        return like.within_node
    return _same(measured["host_to_device"], "host_to_device")


def _same(link: LinkSpeed, name: str) -> LinkSpeed:
    source = f"assumption: equal to {name}, which was measured; it cannot be measured here"
    latency, rate = link.latency_s.value, link.bytes_per_s.value
    return LinkSpeed(
        latency_s=Sourced(value=latency, source=source),
        bytes_per_s=Sourced(value=rate, source=source),
    )
