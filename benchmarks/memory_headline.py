"""The largest model that trains within so many bytes of fast memory: resident, and with tiers.

    python benchmarks/memory_headline.py --out benchmarks/results/memory_headline.json

Every trial trains a few steps in a forked child whose anonymous memory is limited (``RLIMIT_DATA``)
to what it has at its start plus ``--budget``; the gauge is the largest ``RssAnon`` that the parent
samples. Activations, buffers and gradients count; tiers are shared mappings and files, which do
not. The layers of the resident model are bisected; with tiers, models of growing multiples of its
size are tried until one fails.
"""

import argparse
import ctypes
import gc
import math
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from support import write_result

from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import DiskStorage, HostMemory
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import count_parameters
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.ops.cpu.cpu_adamw import load_adamw
from moesaic.ops.cpu.cpu_library import load_library
from moesaic.optim.optimizer import AdamW
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.precision import BFloat16, Float32, Precision
from moesaic.testing.tiny_models import BALANCED_TOP1, tiny_run, tiny_trainer
from moesaic.train.trainer import Trainer
from moesaic.verify.synthetic_batches import VOCABULARY

MIB = 2**20
TRIAL_SECONDS = 600  # a trial that takes longer counts as failed
PRECISIONS: dict[str, Precision] = {
    "float32": Float32(),  # 4 + 4 + 8 bytes per parameter
    "bfloat16": BFloat16(),  # 2 + 2 + 12
    "bfloat16, float32 gradients": BFloat16(gradients="float32"),  # 2 + 4 + 12
}
GROWTH = {  # multiples of the resident model that are tried
    "states and gradients on the host": (7.1, 8.1, 8.6),
    "all away, weights streamed from disk": (20.5, 26.0, 40.0),
}


def plans(folder: str, *, in_flight: int) -> dict[str, MemoryPlan]:
    """Return the memory plans that are compared."""
    disk, host = DiskStorage(folder=folder), HostMemory()
    return {
        "resident": MemoryPlan(),
        "states and gradients on the host": MemoryPlan(
            gradients=host, optimizer_states=host, in_flight_bytes=in_flight
        ),
        "all away, weights streamed from disk": MemoryPlan(
            parameters=disk, gradients=host, optimizer_states=disk, in_flight_bytes=in_flight
        ),
    }


def model_config(layers: int, *, experts: int, dim: int) -> ModelConfig:
    """Return an encoder-decoder with experts in every layer, ``layers`` in both stacks together."""
    stack = Stack(layers=layers - max(1, layers // 3), moe_every=1)
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=dim,
        encoder=stack,
        decoder=stack.replace(layers=max(1, layers // 3)),
        attention=AttentionConfig(heads=4),
        feed_forward=FeedForwardConfig(hidden=2 * dim),
        moe=BALANCED_TOP1.replace(experts=experts),
    )


@dataclass(frozen=True)
class Trial:
    """One run under the limit: whether it trained, its parameters, the peak of its memory."""

    layers: int
    parameters: int
    trained: bool
    peak_anonymous_mib: float
    seconds: float
    failure: str = ""


@dataclass(frozen=True)
class Case:
    """What the trials of one search have in common."""

    plan: MemoryPlan
    precision: Precision
    budget: int
    experts: int
    dim: int
    steps: int


def train(case: Case, layers: int) -> None:
    """Train in this process, limited from now on."""
    gc.collect()
    limit = _status("VmData") + case.budget
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    trainer = _trainer(case, layers)
    for _ in range(case.steps):
        trainer.train_step()


def _trainer(case: Case, layers: int) -> Trainer:
    run = tiny_run(
        model=model_config(layers, experts=case.experts, dim=case.dim),
        optimizer=AdamW(lr=1e-3),
        precision=case.precision,
        parallel=ParallelConfig(memory=case.plan, activation_checkpointing=CheckpointBlocks()),
    )
    return tiny_trainer(run)


def fix_malloc_thresholds() -> None:
    """Have glibc return tensors that are freed: by default it learns to keep them in its heap."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 1 << 18)  # M_TRIM_THRESHOLD


def warm_up(precision: Precision) -> None:
    """Compile kernels and import what a step imports: a child is limited to more than it has."""
    load_library()
    load_adamw()
    case = Case(MemoryPlan(), precision, 0, experts=4, dim=32, steps=1)
    _trainer(case, 2).train_step()


def trial(case: Case, layers: int) -> Trial:
    """Train in a child under the limit, and watch its memory."""
    config = model_config(layers, experts=case.experts, dim=case.dim)
    parameters = count_parameters(config).total
    started, (reader, writer) = time.perf_counter(), os.pipe()
    child = os.fork()
    if not child:
        _run_child(case, layers, writer=writer)
    os.close(writer)
    base = peak = _status("RssAnon", child)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        peak = max(peak, _status("RssAnon", child))
        time.sleep(0.005)
    with os.fdopen(reader) as pipe:
        failure = pipe.read()
    spent = time.perf_counter() - started
    return Trial(layers, parameters, failure == "trained", (peak - base) / MIB, spent, failure)


def _run_child(case: Case, layers: int, *, writer: int) -> None:
    signal.alarm(TRIAL_SECONDS)
    try:
        train(case, layers)
        os.write(writer, b"trained")
    except (MemoryError, RuntimeError, OSError) as error:
        kind = type(error).__name__
        os.write(writer, f"{kind}: {str(error)[:200]}".encode())
    except BaseException:
        os.write(writer, traceback.format_exc()[-800:].encode())
    os._exit(0)


def _status(field: str, pid: int | str = "self") -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split() for line in text.splitlines() if line.startswith(f"{field}:")]
    return int(found[0][1]) * 1024 if found else 0


def largest(case: Case, *, start: int) -> tuple[Trial | None, list[Trial]]:
    """Bisect the largest number of layers that trains; return it with all trials."""
    trials: list[Trial] = []

    def works(layers: int) -> bool:
        trials.append(trial(case, layers))
        print(trials[-1], flush=True)
        return trials[-1].trained

    low, high = 0, start
    while works(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return _largest_of(trials), trials


def growing(case: Case, sizes: Iterable[int]) -> tuple[Trial | None, list[Trial]]:
    """Try growing models until one fails; return the largest that trained, and all trials."""
    trials: list[Trial] = []
    for layers in sizes:
        trials.append(trial(case, layers))
        print(trials[-1], flush=True)
        if not trials[-1].trained:
            break
    return _largest_of(trials), trials


def _largest_of(trials: list[Trial]) -> Trial | None:
    return max((one for one in trials if one.trained), key=lambda one: one.layers, default=None)


def main() -> None:
    """Search and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_headline.json"))
    parser.add_argument("--budget", type=int, default=256, help="MiB")
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16, float32 gradients")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--start", type=int, default=8, help="layers of the first resident model")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    fix_malloc_thresholds()
    warm_up(PRECISIONS[given.precision])
    folder = tempfile.mkdtemp(prefix="memory-headline-")
    found: dict[str, Any] = {}
    resident = 0
    try:
        for name, plan in plans(folder, in_flight=8 * MIB).items():
            case = Case(
                plan,
                PRECISIONS[given.precision],
                given.budget * MIB,
                given.experts,
                given.dim,
                given.steps,
            )
            if name in GROWTH:
                best, trials = growing(case, [math.ceil(m * resident) for m in GROWTH[name]])
            else:
                best, trials = largest(case, start=given.start)
                resident = best.layers if best is not None else 1
            found[name] = {
                "largest": None if best is None else asdict(best),
                "trials": [asdict(one) for one in trials],
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sizes = {n: f["largest"]["parameters"] for n, f in found.items() if f["largest"]}
    ratios = {n: round(size / sizes["resident"], 2) for n, size in sizes.items()}
    result = {
        "budget_mib": given.budget,
        "precision": given.precision,
        "note": given.note,
        "ratios": ratios,
        "found": found,
    }
    write_result(given.out, result)


if __name__ == "__main__":
    main()
