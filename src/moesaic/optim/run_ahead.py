"""Run-ahead updates: made before the gradient norm is known, and rolled back (2509.21271).

The update of a parameter begins when its gradient is complete, on a thread beside the rest of
backward, as if the norm would not clip it. What it overwrites is kept. If the norm clips, or the
step is skipped, the old values are copied back, and the update is made once more as if none had
been. So a run has the bits of one whose updates wait for the norm.

Only elementwise rules run ahead, of parameters whose states are on a tier; the others wait, and so
do parameters whose old values find no room.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moesaic.core.shapes import Int, Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.disk_store import DiskFullError
from moesaic.memory.tensor_store import Part, rows_of
from moesaic.optim.group_update import GroupUpdate, UpdateRule
from moesaic.optim.named_optimizer import MASTER, NamedOptimizer
from moesaic.optim.tiered_states import ParameterRows


@dataclass(frozen=True, slots=True)
class _Kept:
    """What an update of some rows of a group has overwritten."""

    group: dict[str, Any]
    rows: ParameterRows
    old: Sequence[Tensor]


class RunAhead:
    """Updates of the present step that have begun before its norm is known.

    ``memory`` has room for the values that they overwrite; without any, none begins.
    """

    def __init__(
        self,
        optimizer: NamedOptimizer,
        *,
        memory: Int[Tensor, "bytes"],
        executor: Executor | None = None,
    ) -> None:
        self._optimizer, self._memory = optimizer, memory
        self._thread = executor or ThreadPoolExecutor(1, thread_name_prefix="update")
        self._members = {
            parameter: (name, group)
            for group in optimizer.param_groups
            if group["rule"].elementwise
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        self._queue: list[Future[None]] = []
        self._kept: list[_Kept] = []
        self._used = 0  # bytes of the memory

    @property
    def num_bytes(self) -> int:
        """The bytes of the memory; 0: no update runs ahead."""
        return self._memory.nbytes

    def start(self, parameter: Tensor) -> None:
        """Begin the update of a parameter whose gradient is complete."""
        if parameter in self._members:
            self._queue.append(self._thread.submit(self._update, parameter))

    def stop(self) -> None:
        """Wait for the updates that have begun; the rest is left to the optimizer's step."""
        for update in reversed(self._queue):
            update.cancel()
        for update in self._queue:
            if not update.cancelled():
                update.result()
        self._queue = []

    @torch.no_grad()
    def roll_back(self) -> None:
        """Make the values of before again, bit for bit."""
        self.stop()
        for kept in self._kept:
            with self._optimizer.bucket(kept.group, [kept.rows]) as update:
                for tensor, old in zip(_overwritten(update), kept.old, strict=True):
                    (_bytes_of(tensor) if tensor.dim() else tensor).copy_(old)
                update.round_masters()
        self._optimizer.weights.join()
        self._optimizer.updated = {}
        self.forget()

    def forget(self) -> None:
        """Discard what was kept: the norm has accepted the updates."""
        self._kept, self._used = [], 0

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        name, group = self._members[parameter]
        optimizer = self._optimizer
        assert optimizer.tier is not None
        if name in optimizer.updated:
            raise RuntimeError(f"{name}: its gradient was added to after it was complete")
        try:
            members = optimizer.due(name, parameter, rule=group["rule"])
            optimizer.tier.reserve(members)
        except DiskFullError:  # the step will find it full, before it has updated anything
            return
        rule = group["rule"]
        size = sum(overwritten_bytes(optimizer, rows, rule=rule) for rows in members)
        if self._used + size > self.num_bytes:
            return
        optimizer.updated[name] = members
        for part in (part for rows in members for part in optimizer.tier.split(rows)):
            optimizer.update_bucket(group, [part], before=partial(self._keep, group, part))

    def _keep(self, group: dict[str, Any], rows: ParameterRows, update: GroupUpdate) -> None:
        self._kept.append(_Kept(group, rows, [self._copy(each) for each in _overwritten(update)]))

    def _copy(self, tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor.clone()
        memory = self._memory[self._used : self._used + tensor.nbytes]
        self._used += tensor.nbytes
        return memory.copy_(_bytes_of(tensor))


def all_overwritten_bytes(optimizer: NamedOptimizer) -> int:
    """Return the bytes that a step overwrites of what may run ahead."""
    return sum(
        overwritten_bytes(optimizer, ParameterRows(Part(name), parameter), rule=group["rule"])
        for group in optimizer.param_groups
        if group["rule"].elementwise
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    )


def overwritten_bytes(optimizer: NamedOptimizer, rows: ParameterRows, *, rule: UpdateRule) -> int:
    """Return the bytes that an update overwrites of some rows: in float32, and of their states."""
    states = optimizer.expected_state(rows.parameter, rule=rule)
    float32 = (
        0 if MASTER in states else 4 * rows_of(local_tensor(rows.parameter), rows.part).numel()
    )
    return float32 + sum(rows_of(s, rows.part).nbytes for s in states.values() if s.dim())


def _bytes_of(tensor: Tensor) -> Int[Tensor, "bytes"]:
    """Return a view of the bytes of a tensor: codes may end where float32 values may not begin."""
    return tensor.view(-1).view(torch.uint8)


def _overwritten(update: GroupUpdate) -> list[Tensor]:
    """Return the tensors of one member that an update changes; a master is among the states."""
    (state,) = update.states
    found = [*update.params, *state.values()]
    return list({id(tensor): tensor for tensor in found}.values())
