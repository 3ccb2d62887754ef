"""Optimizer state as flat tensors named ``slot/parameter``, e.g. ``exp_avg/encoder.0.norm.weight``.

Names, not positions: state survives a change in the order of parameters, and a mismatch is named.
Learning rates are not state: the schedule gives them for any step.
"""

from collections.abc import Iterator, Mapping

import torch

from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.dist.local import local_tensor
from moesaic.optim.update import NamedOptimizer, UpdateRule


def export_state(optimizer: NamedOptimizer) -> dict[str, Tensor]:
    """Return every state tensor (not copied). A parameter that was never updated has none."""
    return {
        f"{slot}/{name}": tensor
        for name, parameter, _ in _named_parameters(optimizer)
        for slot, tensor in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_state(optimizer: NamedOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put exported state back, bit for bit; the optimizer must have the same rules and parameters.

    All or nothing: raises CheckpointError naming what does not fit, with the optimizer unchanged.
    """
    stepped = {name.partition("/")[2] for name in tensors}
    slots = {
        name: _expected_state(parameter, rule=rule)
        for name, parameter, rule in _named_parameters(optimizer)
        if name in stepped
    }
    _check_state_fits(tensors, {f"{s}/{name}": like for name in slots for s, like in slots[name].items()})
    for name, parameter, _ in _named_parameters(optimizer):
        optimizer.state[parameter] = {
            slot: tensors[f"{slot}/{name}"].to(parameter.device, like.dtype, copy=True)
            for slot, like in slots.get(name, {}).items()
        }


def _named_parameters(optimizer: NamedOptimizer) -> Iterator[tuple[str, Tensor, UpdateRule]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield name, parameter, group["rule"]


def _expected_state(parameter: Tensor, *, rule: UpdateRule) -> dict[str, Tensor]:
    like = torch.empty_like(local_tensor(parameter), dtype=torch.float32, device="meta")
    slots = dict(rule.initial_state(like))
    return slots if parameter.dtype == torch.float32 else {"master": like} | slots


def _check_state_fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys())
    other = [
        f"{key} {list(tensors[key].shape)} instead of {list(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    kinds = (("missing", missing), ("unknown here", unknown), ("of another shape", other))
    if any(names for _, names in kinds):
        found = "; ".join(f"{what}: {_name_some(names)}" for what, names in kinds if names)
        raise CheckpointError(
            f"the optimizer state does not fit: {found}. "
            "Resume with the model and the optimizer that the checkpoint was saved with."
        )


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
