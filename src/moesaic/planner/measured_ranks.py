"""Measured ranks: timings of two ranks at once, of their collectives and of ZeRO's units.

Ranks that share the cores of a host pay more for a collective than a loop of collectives shows: one
comes late, the threads that send wait for a core, and compute after it finds caches cold. So here a
collective is called between pieces of compute, and its time is what it adds to theirs, as a mean
over both ranks.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from moesaic.core.shapes import Tensor
from moesaic.distributed.collectives import all_gather_rows
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.planner.measured_rates import (
    MIN_ROUNDS,
    Measurement,
    Stopwatch,
    expert_layer,
    loop,
    memory_bound,
)
from moesaic.planner.synthetic_steps import MIDDLE, steps_in_turn

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce")
LINK_SIZES = (2**12, 2**18, 2**22)
CALL_SIZES = (2**8, 2**14, 2**18, 2**20, 2**23)
MEMORY_SIZES = tuple(12 * 4**n for n in range(3, 12))
UNITS, MATRICES, DIMS = 3, 8, (16, 64, 192, 512)
MIN_CALL_S = 1e-6  # of a difference of timings
ROUNDS_OF_BOTH = 12
_Timing = tuple[str, float, tuple[float, ...]]  # fields of a Measurement, which ranks pickle


@dataclass(frozen=True, slots=True)
class RankTimings:
    """Timings of two ranks.

    ``link`` are collectives in a loop, ``pairs`` work that overlaps a collective or other ranks'
    work, ``shared`` what ranks on the same cores add to a step by kind (empty on GPUs).
    """

    link: list[Measurement]
    pairs: dict[str, Measurement]
    shared: dict[str, list[Measurement]]


def measure_ranks(*, point_s: float, cuda: bool) -> RankTimings:
    """Time two forked ranks; sizes are the bytes that a rank sends."""
    both = run_on_ranks(2, _measure, point_s, "cuda" if cuda else "cpu", timeout_s=120)
    pairs = {each[0]: Measurement(*each) for each in both[0]["pairs"]}
    link = [Measurement(*each) for each in both[0]["link"]]
    shared = {
        kind: [Measurement(*each) for each in found] for kind, found in both[0]["shared"].items()
    }
    return RankTimings(link, pairs, shared)


def _measure(point_s: float, kind: str) -> dict[str, Any]:
    """Run on each of two ranks; all ranks do the same number of rounds."""
    rank = distributed.get_rank()
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    group: Any = distributed.new_group(backend="nccl" if kind == "cuda" else "gloo")
    watch, link = Stopwatch(device, point_s), list[_Timing]()
    for size in LINK_SIZES:
        for name in COLLECTIVES:
            call = _collective_call(name, size, device=device, group=group)
            rounds = max(MIN_ROUNDS, min(50, round(point_s * 2**28 / (size + 2**18))))
            link.append((f"{name} {size}", float(size), _seconds(watch, call, rounds)))
    pairs = [_all_devices(watch, group=group), _product_beside(watch, group=group)]
    shared = {} if kind == "cuda" else _shared_cores(watch, group=group)
    return {"link": link, "pairs": pairs, "shared": shared}


def _seconds(watch: Stopwatch, call: Callable[[], object], rounds: int) -> tuple[float, ...]:
    """Time a call so often, after one to warm up."""
    return tuple([watch.time(call) for _ in range(rounds + 1)][1:])


def _added_between(
    watch: Stopwatch,
    call: Callable[[], object],
    rounds: int,
    *,
    compute: Callable[[], object],
    group: Any,
) -> tuple[float, ...]:
    """Return what each of five calls between pieces of compute adds to theirs, on both ranks.

    A step has the sum of several calls, some of which take ten times what others take.
    """

    def with_calls() -> None:
        for _ in range(5):
            compute()
            call()

    five = loop(compute, 5)
    found = [(watch.time(with_calls) - watch.time(five)) / 5 for _ in range(rounds)]
    return tuple(max(MIN_CALL_S, each) for each in _mean_of_ranks(found, group=group))


def _mean_of_ranks(seconds: Sequence[float], *, group: Any) -> tuple[float, ...]:
    both = torch.tensor(seconds, dtype=torch.float64)
    distributed.all_reduce(both, group=group)
    return tuple((both / 2).tolist())


def _shared_cores(watch: Stopwatch, *, group: Any) -> Mapping[str, Sequence[_Timing]]:
    """Time what is slower beside another rank: collectives, ZeRO's units, large operands.

    Collectives and operands are timed in two passes, some seconds apart, of which the faster
    counts: what else a shared host does only makes them slower. Of ZeRO's units, which are small
    differences of two models' timings, all samples count.
    """
    passes = [_shared_once(watch, group=group) for _ in range(2)]
    found: dict[str, list[_Timing]] = {}
    for same in zip(*passes, strict=True):
        fastest = min(same, key=lambda each: statistics.median(each[2]))
        found.setdefault(fastest[0].split()[0], []).append(fastest)
    units = [_unit_timings(watch, dim, group=group) for dim in DIMS]
    found["unit-gather"], found["unit-scatter"] = map(list, zip(*units, strict=True))
    return found


def _shared_once(watch: Stopwatch, *, group: Any) -> list[_Timing]:
    compute, found = _piece_of_compute(), list[_Timing]()
    for name in COLLECTIVES:
        for size in CALL_SIZES:
            call = _collective_call(name, size, device=watch.device, group=group)
            rounds = 6 if size > 2**20 else 12
            seconds = _added_between(watch, call, rounds, compute=compute, group=group)
            found.append((f"{name} {size} between compute", float(size), seconds))
    for size in MEMORY_SIZES:
        distributed.barrier(group=group)
        each = memory_bound(watch, size=size)
        # ranks differ in their numbers of rounds, but not in that of quartiles
        quartiles = statistics.quantiles(each.seconds, n=4)
        seconds = _mean_of_ranks(quartiles, group=group)
        found.append((f"memory {size}, two ranks", each.size, seconds))
    return found


def _piece_of_compute() -> Callable[[], None]:
    """Return a millisecond of products and of operands from memory."""
    x, large = torch.randn(256, 256), torch.randn(2**20)

    def compute() -> None:
        for _ in range(4):
            torch.mm(x, x)
        torch.mul(large, 2.0)

    return compute


class _Unit(nn.Module):
    """Some square matrices, one after the other, on few rows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.eye(dim) for _ in range(MATRICES))

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            x = F.linear(x, matrix)
        return x


def _unit_timings(watch: Stopwatch, dim: int, *, group: Any) -> tuple[_Timing, _Timing]:
    """Time what FSDP2 adds to a unit: a gather of its weights, and a sum of its gradients.

    Hooks, copies and collectives are in it. A backward pass gathers once more than a forward pass.
    """
    plain, sharded = (nn.Sequential(*(_Unit(dim) for _ in range(UNITS))) for _ in range(2))
    mesh = DeviceMesh.from_group(group, "cpu")
    for unit in (*sharded, sharded):
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not sharded)
    x = torch.ones(4, dim)
    calls = [each(model, x) for model in (plain, sharded) for each in (_forward, _forward_backward)]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(6):
        for call, kept in zip(calls, samples, strict=True):
            distributed.barrier(group=group)
            kept += _mean_of_ranks(_seconds(watch, call, 4), group=group)
    forward, both, sharded_forward, sharded_both = map(statistics.median, samples)
    gather = max((sharded_forward - forward) / UNITS, MIN_CALL_S)
    scatter = max((sharded_both - both) / UNITS - 2 * gather, MIN_CALL_S)
    sent = MATRICES * dim * dim * 4 / 2
    names = (("gather", gather), ("scatter", scatter))
    first, second = ((f"unit {name} {dim}", sent, (found,)) for name, found in names)
    return first, second


def _forward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            model(x)

    return call


def _forward_backward(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        model(x).sum().backward()
        model.zero_grad()

    return call


def _all_devices(watch: Stopwatch, *, group: Any) -> _Timing:
    """Time compute on rank 0 alone, then on both ranks: steps, on a GPU a layer.

    Of both the later one counts, as ranks wait for each other. The two take turns, so that another
    program slows both.
    """
    layer = (
        expert_layer(watch, tokens=2048, dim=128, dtype=torch.float32)
        if watch.device.type == "cuda"
        else steps_in_turn(MIDDLE)
    )
    layer()
    is_first = distributed.get_rank() == 0
    alone, both = torch.zeros(2, ROUNDS_OF_BOTH, dtype=torch.float64)
    for number in range(ROUNDS_OF_BOTH):
        distributed.barrier(group=group)
        alone[number] = watch.time(layer) if is_first else 0
        distributed.barrier(group=group)
        both[number] = watch.time(layer)
    distributed.all_reduce(alone, group=group)
    distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=group)
    longer = float(alone.median())
    ratios = (both / alone).clamp(1, 2)
    return "all_devices", longer, tuple((longer * ratios).tolist())


def _product_beside(watch: Stopwatch, *, group: Any) -> _Timing:
    """Time products beside an all-reduce that takes as long."""
    size = LINK_SIZES[-1]
    x = torch.randn(256, 256, device=watch.device)
    sent = torch.zeros(size // 4, device=watch.device)
    collective = _collective_call("all-reduce", size, device=watch.device, group=group)
    alone = statistics.median([watch.time(collective) for _ in range(5)])
    product = statistics.median([watch.time(lambda: x @ x) for _ in range(20)])
    counts = torch.tensor([max(1.0, alone / product)])
    distributed.all_reduce(counts, op=distributed.ReduceOp.MIN)
    products = loop(lambda: x @ x, int(counts))

    def both() -> None:
        work = distributed.all_reduce(sent, group=group, async_op=True)
        products()
        if work is not None:
            work.wait()

    longer = max(alone, watch.time(products))
    seconds = tuple(max(longer, watch.time(both)) for _ in range(MIN_ROUNDS))
    return "product_collective", longer, seconds


def _collective_call(
    kind: str, size: int, *, device: torch.device, group: Any
) -> Callable[[], object]:
    """Return a collective in which each of two ranks sends ``size`` bytes, into a new tensor."""
    values = size // 4
    if kind == "all-reduce":  # 2 (n - 1) / n of the tensor
        x = torch.zeros(values, device=device)
        return lambda: distributed.all_reduce(x.clone(), group=group)
    if kind == "all-gather":
        part = torch.zeros(values, device=device)
        return lambda: all_gather_rows(part, group=group, sizes=(values, values))
    x = torch.zeros(2 * values, device=device)
    return lambda: distributed.all_to_all_single(torch.empty_like(x), x, group=group)
