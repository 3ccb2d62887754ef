"""Optimizer state as named tensors, for checkpoints.

A float32 master is exported as the weight of its parameter, so a checkpoint can be resumed in any
precision. Other state is exported as flat tensors named ``slot/parameter``, e.g.
``exp_avg/encoder.0.norm.weight``: it does not depend on the order of parameters. Learning rates are
not state: the schedule gives them for any step.
"""

from collections.abc import Iterator, Mapping, Set

import torch

from moesaic.core.errors import CheckpointError, listed
from moesaic.core.shapes import Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.disk_store import DiskFullError
from moesaic.memory.tensor_store import Access, Part
from moesaic.optim.group_update import UpdateRule
from moesaic.optim.late_updates import ExpertBank
from moesaic.optim.named_optimizer import MASTER, NamedOptimizer
from moesaic.optim.tiered_states import ParameterRows


def frozen_state(optimizer: NamedOptimizer) -> dict[str, Tensor]:
    """Return every state tensor. A parameter that was never updated has none.

    Those on the device are not copied; those on a tier are as they are now, whatever follows.
    """
    is_full = False
    try:
        optimizer.catch_up()
    except DiskFullError:  # the last checkpoint of a run needs none of the tier's room
        is_full = True
    tiered = optimizer.tier.store.freeze() if optimizer.tier else {}
    state = _resident_state(optimizer) | dict(tiered)
    late = [bank for bank in optimizer.late.banks.values() if is_full and bank.late]
    for bank in late:
        state |= _late_in_memory(optimizer, bank)
    return state


def frozen_names(optimizer: NamedOptimizer) -> Set[tuple[str, str]]:
    """Return the file and name in a checkpoint of what ``frozen_state`` has frozen."""
    names = (name.partition("/") for name in (optimizer.tier.store.specs if optimizer.tier else ()))
    return {
        ("model", name) if slot == MASTER else ("optimizer", f"{slot}/{name}")
        for slot, _, name in names
    }


def _late_in_memory(optimizer: NamedOptimizer, bank: ExpertBank) -> dict[str, Tensor]:
    """Return copies of the states of a bank with late experts, brought up to date.

    What no update has reached yet is read, not mapped: a mapping may need room on its disk.
    """
    assert optimizer.tier is not None
    parts = optimizer.tier.parts(ParameterRows(Part(bank.name), bank.parameter))
    with optimizer.tier.store.fetch(list(parts.values()), access=Access.READ) as whole:
        copies = {slot: each.clone() for slot, each in zip(parts, whole, strict=True)}
    for expert in bank.late:
        state = optimizer.catch_up_weights(bank, expert)
        for slot in parts:
            copies[slot][expert].copy_(state[slot][0])
        copies |= {slot: t for slot, t in state.items() if not t.dim()}
    return {f"{slot}/{bank.name}": copy for slot, copy in copies.items()}


def live_state(optimizer: NamedOptimizer) -> dict[str, Tensor]:
    """Return views of every state tensor, to be read or overwritten at once."""
    optimizer.catch_up()
    state = _resident_state(optimizer)
    for name, _, _ in _named_parameters(optimizer):
        tiered = optimizer.tier.live(name) if optimizer.tier else {}
        state |= {f"{slot}/{name}": tensor for slot, tensor in tiered.items()}
    return state


def state_blocks(optimizer: NamedOptimizer) -> dict[str, int]:
    """Return the number of values of a row that share a number of a state tensor, by its name."""
    return {
        f"{slot}/{name}": block
        for name, _, rule in _named_parameters(optimizer)
        for slot, block in rule.state_blocks.items()
    }


def without_masters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state that a checkpoint has beside weights."""
    return {key: tensor for key, tensor in state.items() if key.partition("/")[0] != MASTER}


def masters_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the float32 master of every parameter that has one, by its name."""
    parts = ((key.partition("/"), tensor) for key, tensor in state.items())
    return {name: tensor for (slot, _, name), tensor in parts if slot == MASTER}


@torch.no_grad()
def round_masters(optimizer: NamedOptimizer) -> None:
    """Round every float32 master into its parameter, after masters were loaded."""
    masters = masters_of(live_state(optimizer))
    for name, parameter, _ in _named_parameters(optimizer):
        if name in masters:
            local_tensor(parameter).copy_(masters[name])


def _resident_state(optimizer: NamedOptimizer) -> dict[str, Tensor]:
    return {
        f"{slot}/{name}": tensor
        for name, parameter, _ in _named_parameters(optimizer)
        for slot, tensor in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_state(
    optimizer: NamedOptimizer, tensors: Mapping[str, Tensor], *, weights: Mapping[str, Tensor]
) -> None:
    """Restore exported state bit for bit; the optimizer must have the same rules and parameters.

    ``weights`` become the masters of parameters that have state and are of a narrow dtype.
    All or nothing: raises CheckpointError naming what does not fit, with the optimizer unchanged.
    """
    stepped = {name.partition("/")[2] for name in tensors}
    slots = {
        name: optimizer.expected_state(parameter, rule=rule)
        for name, parameter, rule in _named_parameters(optimizer)
        if name in stepped
    }
    tensors = {
        **tensors,
        **{f"{MASTER}/{name}": weights[name] for name, like in slots.items() if MASTER in like},
    }
    _check_state_fits(
        tensors, {f"{s}/{name}": like for name in slots for s, like in slots[name].items()}
    )
    optimizer.state.clear()
    optimizer.late.clear()
    if optimizer.tier is not None:
        optimizer.tier.clear()
    for name, parameter, rule in _named_parameters(optimizer):
        if name in slots:
            optimizer.ensure_state(name, parameter, rule=rule)
    for key, tensor in live_state(optimizer).items():
        tensor.copy_(tensors[key])


def _named_parameters(optimizer: NamedOptimizer) -> Iterator[tuple[str, Tensor, UpdateRule]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield name, parameter, group["rule"]


def _check_state_fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    other = [
        f"{key} {list(tensors[key].shape)} instead of {list(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", other))
    if any(names for _, names in kinds):
        found = "; ".join(f"{what}: {listed(names, most=3)}" for what, names in kinds if names)
        raise CheckpointError(
            f"the optimizer state does not fit: {found}. "
            "Resume with the model and the optimizer that the checkpoint was saved with."
        )
