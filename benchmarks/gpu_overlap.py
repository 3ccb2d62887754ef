"""Copies of memory tiers on one GPU: are they right, and how much of their time is hidden?

Each plan runs with its copies on streams of their own, and with all on the stream that computes,
where copies are made in turn. Both must have the same bits. What stays on the device where an
update computes (weights and activations on a tier) must have those of a resident run, too; an
update on the host has the processor's arithmetic. The share of the copies' time that is hidden is
``(in turn - overlapped) / (in turn - resident)``.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from gpu_training import Setting, released, seconds_of_steps
from memory_headline import model_config

from moesaic.memory import device_copies
from moesaic.memory.device_copies import DeviceStreams
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.optim.optimizer_state import live_state
from moesaic.parallel.precision import BFloat16, Float32

HOST = HostMemory()
RESIDENT = MemoryPlan()
PLANS = {
    "activations": MemoryPlan(activations=HOST),
    "parameters": MemoryPlan(parameters=HOST),
    "gradients": MemoryPlan(gradients=HOST),
    "gradients and states": MemoryPlan(gradients=HOST, optimizer_states=HOST),
    "all": MemoryPlan(parameters=HOST, gradients=HOST, optimizer_states=HOST, activations=HOST),
}
SAME_ARITHMETIC = ("activations", "parameters")  # as a resident run


@contextmanager
def copies_in_turn(device: torch.device) -> Iterator[None]:
    """Make all copies on the stream that computes."""
    if device_copies.device_streams(device) is None:  # a CPU copies in turn
        yield
        return
    stream = torch.accelerator.current_stream(device)
    same = DeviceStreams(device, lambda: stream, stream, stream, lambda: torch.Event(device))
    with patch.object(device_copies, "device_streams", lambda _: same):
        yield


def _tensors(setting: Setting, *, steps: int) -> dict[str, torch.Tensor]:
    with released(setting.device):
        trainer = setting.trainer()
        seconds_of_steps(trainer, count=steps, device=setting.device)
        weights = {name: p.detach().cpu() for name, p in trainer.model.named_parameters()}
        return weights | {
            name: t.cpu().clone() for name, t in live_state(trainer.optimizer).items()
        }


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(map(torch.equal, first.values(), second.values()))


def correctness(device: torch.device) -> dict[str, Any]:
    """Return, by plan, whether all bits after three steps are those of the runs compared with."""
    config = model_config(4, experts=8, dim=128)
    sizes = BatchDims(4, 32, 32)

    def trained(memory: MemoryPlan) -> dict[str, torch.Tensor]:
        # a bound that holds a part of a bank of experts, so that copies take turns
        bounded = memory.replace(in_flight_bytes=2**18)
        return _tensors(Setting(config, bounded, Float32(), sizes, device), steps=3)

    resident = trained(RESIDENT)
    found: dict[str, Any] = {"resident, repeated": _equal(resident, trained(RESIDENT))}
    for name, memory in PLANS.items():
        overlapped = trained(memory)
        with copies_in_turn(device):
            in_turn = trained(memory)
        found[name] = {"overlapped equals in turn": _equal(overlapped, in_turn)}
        if name in SAME_ARITHMETIC:
            found[name]["equals resident"] = _equal(overlapped, resident)
    return found


def overlap(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Return, by plan, the seconds of a step overlapped and in turn, and the share hidden."""
    config = model_config(2 if tiny else 12, experts=4 if tiny else 16, dim=32 if tiny else 1024)
    sizes = BatchDims(2, 16, 16) if tiny else BatchDims(32, 256, 256)

    def seconds(memory: MemoryPlan) -> float:
        with released(device):
            trainer = Setting(config, memory, BFloat16(), sizes, device).trainer()
            return statistics.median(seconds_of_steps(trainer, count=5, device=device)[1:])

    resident, found = seconds(RESIDENT), dict[str, Any]()
    for name, memory in PLANS.items():
        overlapped = seconds(memory)
        with copies_in_turn(device):
            in_turn = seconds(memory)
        copied = in_turn - resident
        found[name] = {
            "overlapped_s": round(overlapped, 4),
            "in_turn_s": round(in_turn, 4),
            "hidden": round((in_turn - overlapped) / copied, 3) if copied > 0 else None,
        }
    return {"resident_s": round(resident, 4), "plans": found}
