"""Measured rates: timings of single calls and of contended pairs on this machine.

Each returns a ``Measurement``: the times of repeated calls, from which ``calibrate.py`` makes the
numbers of a machine file. Calls run under autograd where training runs them so.
"""

import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Tensor
from moesaic.moe.dispatcher import LocalDispatcher
from moesaic.moe.experts import ExpertShape, GroupedExperts
from moesaic.moe.routing import Routing
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.optim.optimizer import AdamW

MIN_ROUNDS, MAX_ROUNDS = 5, 1000
EXPERTS = 8
OPERAND_BYTES, MAX_IN_TURN = 48 * 2**20, 16  # of calls that take turns; more than a cache has
CHAIN = 16  # operations of a chain whose time is divided by their number
UPDATE_BYTES = 28  # AdamW in float32: reads weight, gradient and two moments, writes all but one


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of repeated calls; ``size`` is the work of one call (FLOPs or bytes)."""

    what: str
    size: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median, 0 of one sample."""
        if len(self.seconds) == 1:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    @property
    def rate(self) -> float:
        return self.size / self.median


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Times calls on a device, for about ``point_s`` seconds each."""

    device: torch.device
    point_s: float

    def measure(self, what: str, call: Callable[[], object], *, size: float) -> Measurement:
        """Return the times of repeated calls, after two that warm up."""
        call()
        first = self.time(call)
        rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, self.point_s / max(first, 1e-7))))
        return Measurement(what, size, tuple(self.time(call) for _ in range(rounds)))

    def time(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call."""
        self.synchronize()
        started = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _in_turn(make: Callable[[], Callable[[], object]], *, size: int) -> Callable[[], object]:
    """Return calls with operands of their own in turn: as in a step, they are in no near cache.

    ``size`` are the bytes of the operands of one.
    """
    number = max(1, min(MAX_IN_TURN, OPERAND_BYTES // size))
    turns = cycle([make() for _ in range(number)])
    return lambda: next(turns)()


def dense_product(watch: Stopwatch, *, rows: int, dim: int, dtype: torch.dtype) -> Measurement:
    """Time a product [rows, dim] @ [dim, dim] with both of its gradients, as one of the three."""

    def make() -> Callable[[], object]:
        x, weight, grad = _leaves(watch, (rows, dim), (dim, dim), (rows, dim), dtype=dtype)
        return lambda: torch.autograd.grad(F.linear(x, weight), (x, weight), grad)

    one = _in_turn(make, size=(2 * rows + dim) * dim * dtype.itemsize)
    call = loop(one, 3)
    found = watch.measure(f"dense product {rows}x{dim}", call, size=2.0 * rows * dim * dim)
    return Measurement(found.what, found.size, tuple(s / 9 for s in found.seconds))


def grouped_product(watch: Stopwatch, *, tokens: int, dim: int, dtype: torch.dtype) -> Measurement:
    """Time an MoE layer of eight SwiGLU experts, top-1, with its gradients.

    ``size`` are the FLOPs of one of its 2 products per expert; the kernel is the selected one, so
    permutation and activation are in the time.
    """
    experts, hidden = EXPERTS, 2 * dim
    size = 2 * (experts * 3 * dim * hidden + 2 * tokens * dim) * dtype.itemsize
    make = partial(expert_layer, watch, tokens=tokens, dim=dim, dtype=dtype)
    call = _in_turn(make, size=size)
    # forward and backward: three products of each of the two matrices of every expert
    flops = 2.0 * tokens / experts * dim * hidden * 1.5
    found = watch.measure(f"grouped product {tokens}x{dim}", call, size=flops)
    calls = 3 * 2 * experts
    return Measurement(found.what, found.size, tuple(s / calls for s in found.seconds))


def expert_layer(
    watch: Stopwatch, *, tokens: int, dim: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Return forward and backward of a layer of experts [dim, 2 dim], top-1, evenly routed."""
    with torch.device(watch.device):
        feed_forward = FeedForwardConfig(hidden=2 * dim, activation=SwiGLU())
        module = GroupedExperts(ExpertShape(EXPERTS, dim, feed_forward, bias=False)).to(dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(tokens, dim, dtype=dtype, requires_grad=True)
        expert = (torch.arange(tokens) % EXPERTS)[:, None]
        weight = torch.ones(tokens, 1, requires_grad=True)
        grad = torch.randn(tokens, dim, dtype=dtype)
    routing = Routing.from_topk(weight, expert=expert, num_experts=EXPERTS)
    dispatcher = LocalDispatcher()

    def call() -> None:
        out = dispatcher.run_experts(x, routing=routing, experts=module)
        torch.autograd.grad(out, (x, *module.parameters()), grad)

    return call


def attention(watch: Stopwatch, *, tokens: int, dtype: torch.dtype) -> Measurement:
    """Time causal attention of 4 heads of 32 with its gradients: 3.5 times the forward FLOPs.

    All lengths have 1,024 tokens in all, as a micro-batch has short rows or few.
    """
    rows = max(1, 1024 // tokens)
    shape = (rows, 4, tokens, 32)

    def make() -> Callable[[], object]:
        q, k, v, grad = _leaves(watch, shape, shape, shape, shape, dtype=dtype)

        def call() -> None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), grad)

        return call

    call = _in_turn(make, size=4 * math.prod(shape) * dtype.itemsize)
    flops = 2.0 * rows * 4 * tokens * tokens * 32  # as they are counted: the causal half
    found = watch.measure(f"attention {tokens}", call, size=flops)
    return Measurement(found.what, flops, tuple(s / 3.5 for s in found.seconds))


def memory_bound(watch: Stopwatch, *, size: int) -> Measurement:
    """Time one of the elementwise operations of a chain and its gradients, ``size`` bytes in all.

    Every operation has a factor of its own and its result is kept for backward, as activations are,
    so large operands come from memory and not from a cache.
    """
    values = size // 12
    x, grad, *factors = _leaves(watch, *((values,) for _ in range(CHAIN + 2)), dtype=torch.float32)

    def call() -> None:
        y = x
        for factor in factors:
            y = y * factor
        torch.autograd.grad(y, (x, *factors), grad)

    found = watch.measure(f"memory {size}", call, size=float(size))
    # each product has two gradients
    return Measurement(found.what, found.size, tuple(s / (3 * CHAIN) for s in found.seconds))


def copy(watch: Stopwatch, *, size: int, to_device: bool) -> Measurement:
    """Time a copy between host memory and the device: pinned memory on CUDA, memory on a CPU."""
    call, name = _copy_call(watch, size, to_device=to_device)
    return watch.measure(f"{name} {size}", call, size=float(size))


def disk(watch: Stopwatch, folder: Path, *, size: int, write: bool) -> Measurement:
    """Time a write that reaches the disk, or a read that the page cache does not answer."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        content = os.urandom(size)
        file.write(content)
        os.fsync(file.fileno())
        call = _disk_write(file.fileno(), content) if write else _disk_read(file.fileno(), size)
        return watch.measure(f"disk {'write' if write else 'read'} {size}", call, size=float(size))


def optimizer_update(watch: Stopwatch, *, values: int) -> Measurement:
    """Time AdamW's update of a tensor on the host, by the bytes that it reads and writes."""
    parameter = torch.nn.Parameter(torch.zeros(values))
    parameter.grad = torch.ones(values)
    optimizer = AdamW().build([("weight", parameter)], kinds={"weight": "matrix"})
    host = Stopwatch(torch.device("cpu"), watch.point_s)
    return host.measure("update", optimizer.step, size=float(UPDATE_BYTES * values))


def contended(
    watch: Stopwatch, what: str, pair: tuple[Callable[[], object], Callable[[], object]]
) -> Measurement:
    """Time two calls at once, each repeated to take as long as the other.

    ``size`` is the time of the longer one alone, so 1 / ``rate`` is the slow-down. The second runs
    in a thread; on CUDA it is enqueued on a stream of its own.
    """
    alone = [watch.measure(what, call, size=0).median for call in pair]
    repeats = [max(1, round(max(watch.point_s / 10, *alone) / t)) for t in alone]
    spent = [t * n for t, n in zip(alone, repeats, strict=True)]
    loops = [loop(call, n) for call, n in zip(pair, repeats, strict=True)]
    stream = torch.cuda.Stream(watch.device) if watch.device.type == "cuda" else None

    def second() -> None:
        with torch.cuda.stream(stream):  # None: no stream, on a CPU
            loops[1]()

    def both() -> None:
        thread = threading.Thread(target=second)
        thread.start()
        loops[0]()
        thread.join()

    found = watch.measure(what, both, size=max(spent))
    low, high = max(spent), sum(spent)  # full overlap and taking turns; beyond is noise
    return Measurement(what, max(spent), tuple(min(high, max(low, s)) for s in found.seconds))


def contended_calls(watch: Stopwatch, folder: Path) -> dict[str, Measurement]:
    """Time the pairs of work that a step overlaps."""
    x, weight = _leaves(watch, (256, 256), (256, 256), dtype=torch.float32)
    size = 2**24

    def product() -> Tensor:
        with torch.no_grad():
            return x @ weight

    there, _ = _copy_call(watch, size, to_device=True)
    back, _ = _copy_call(watch, size, to_device=False)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(size))
        file.flush()
        read = _disk_read(file.fileno(), size)
        pairs = {
            "product_copy": (product, there),
            "copy_copy": (there, back),
            "disk_product": (product, read),
        }
        return {name: contended(watch, name, pair) for name, pair in pairs.items()}


def _leaves(watch: Stopwatch, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(shape, device=watch.device, dtype=dtype, requires_grad=True) for shape in shapes
    ]


def _copy_call(watch: Stopwatch, size: int, *, to_device: bool) -> tuple[Callable[[], object], str]:
    cuda = watch.device.type == "cuda"
    host = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
    device = torch.zeros(size, dtype=torch.uint8, device=watch.device)
    if to_device:
        return lambda: device.copy_(host, non_blocking=True), "host to device"
    return lambda: host.copy_(device, non_blocking=True), "device to host"


def _disk_write(file: int, content: bytes) -> Callable[[], object]:
    def call() -> None:
        os.pwrite(file, content, 0)
        os.fsync(file)

    return call


def _disk_read(file: int, size: int) -> Callable[[], object]:
    def call() -> None:
        os.posix_fadvise(file, 0, size, os.POSIX_FADV_DONTNEED)
        os.pread(file, size, 0)

    return call


def loop(call: Callable[[], object], repeats: int) -> Callable[[], None]:
    """Return a call that makes so many calls."""

    def calls() -> None:
        for _ in range(repeats):
            call()

    return calls
