"""Calibration: measure this machine in under a minute and write its machine file and receipts."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.machine_info import git_commit, machine_info
from moesaic.planner.machine import (
    ContendedPairs,
    LinkSpeed,
    Machine,
    Products,
    SizedRate,
    SlowDown,
    Sourced,
    host_memory_bytes,
)
from moesaic.planner.measured_rates import (
    Measurement,
    Stopwatch,
    attention,
    collectives,
    contended_calls,
    copy,
    dense_product,
    disk,
    grouped_product,
    memory_bound,
    optimizer_update,
    step_call,
)

FULL_POINT_S, QUICK_POINT_S = 0.25, 0.03
COPY_SIZES, SEND_SIZES = (2**14, 2**20, 2**25), (2**12, 2**18, 2**22)
MIB = 2**20


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
    sizes = torch.cuda.device_count() if cuda else 2
    run = _Run(QUICK_POINT_S if quick else FULL_POINT_S, cuda=cuda, notify=notify)
    # first: ranks are forked, which must be before this process starts threads or CUDA
    sent = collectives(point_s=run.point_s, cuda=cuda, sizes=SEND_SIZES) if sizes > 1 else []
    run.keep("collectives of two ranks", *sent)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        machine = _measure_machine(run, sent=sent, scratch=Path(scratch), like=like)
    machine = machine.replace(name=name or machine.name)
    return Calibration(machine, tuple(run.kept), time.perf_counter() - started)


class _Run:
    """The measurements of a calibration, in order."""

    def __init__(self, point_s: float, *, cuda: bool, notify: Callable[[str], object]) -> None:
        self.point_s, self.cuda, self._notify = point_s, cuda, notify
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
        return SlowDown(value=round(max(1.0, 1 / found.rate), 3), source=self.source)


def _measure_machine(
    run: _Run, *, sent: Sequence[Measurement], scratch: Path, like: Machine | None
) -> Machine:
    watch = run.watch
    pairs = contended_calls(watch, scratch)
    run.keep("contended pairs", *pairs.values())
    links = {
        "host_to_device": [copy(watch, size=n, to_device=True) for n in COPY_SIZES],
        "device_to_host": [copy(watch, size=n, to_device=False) for n in COPY_SIZES],
        "disk_read": [disk(watch, scratch, size=n, write=False) for n in COPY_SIZES],
        "disk_write": [disk(watch, scratch, size=n, write=True) for n in COPY_SIZES],
    }
    measured = {name: run.link(name.replace("_", " "), found) for name, found in links.items()}
    call = step_call(watch)
    run.keep("calls within a step", call)
    loops = [memory_bound(watch, size=12 * 4**n) for n in range(3, 12)]
    memory = within_step(loops, call=call, asynchronous=run.cuda)
    update = optimizer_update(watch, values=2**22)
    run.keep("optimizer update", update)
    by_kind = [m for m in sent if m.what.startswith("all-")]
    within = run.link("collectives", by_kind) if by_kind else _borrowed(like, measured)
    pairs |= {m.what: m for m in sent if m not in by_kind}
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
        products=_measure_products(run),
        memory=run.curve("memory-bound operations", memory),
        within_node=within,
        between_nodes=like.between_nodes if like else _same(within, "within_node"),
        **measured,
        update=run.number(update.rate),
        contended=ContendedPairs(**slow),
        price_per_device_hour=like.price_per_device_hour if like else None,
    )


def _measure_products(run: _Run) -> dict[str, Products]:
    watch = run.watch
    found: dict[str, Products] = {}
    shapes = ((64, 64), (256, 64), (256, 128), (512, 256), (512, 512))
    if run.cuda:
        shapes = ((256, 512), (1024, 1024), (4096, 2048), (8192, 4096), (8192, 8192))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        dense = [dense_product(watch, rows=r, dim=d, dtype=dtype) for r, d in shapes]
        grouped = [grouped_product(watch, tokens=2 * r, dim=d, dtype=dtype) for r, d in shapes]
        mixed = [attention(watch, tokens=n, dtype=dtype) for n in (32, 128, 512)]
        found[name] = Products(
            peak=run.number(max(m.rate for m in dense)),
            dense=run.curve(f"dense products in {name}", dense),
            grouped=run.curve(f"grouped products in {name}", grouped),
            attention=run.curve(f"attention in {name}", mixed),
        )
    return found


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
