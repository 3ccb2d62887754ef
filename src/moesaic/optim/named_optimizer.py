"""NamedOptimizer: a ``torch.optim.Optimizer`` whose groups have update rules and parameter names.

Every group has a ``name`` (``adamw/norm``), a ``rule`` (its update), ``lr`` and ``base_lr``: a
schedule writes ``lr = base_lr * factor``. State is float32 and covers the shard of a parameter that
is on this rank. A parameter of a narrower type (bfloat16) has a float32 ``master`` copy: the rule
updates it, and it is then rounded into the parameter, so that small updates are not lost.

State is exported as flat tensors named ``slot/parameter``, e.g. ``exp_avg/encoder.0.norm.weight``:
it does not depend on the order of parameters. Learning rates are not state: the schedule gives them
for any step.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from moesaic.core.errors import CheckpointError
from moesaic.core.shapes import Tensor
from moesaic.distributed.world import local_tensor


@runtime_checkable
class MatrixSharding(Protocol):
    """Gives rules that need whole matrices those that this rank owns."""

    def update_maps(
        self,
        parts: Mapping[str, Tensor],
        *,
        fused: Mapping[str, Sequence[int]],
        function: Callable[[Sequence[Tensor]], None],
    ) -> None:
        """Apply ``function``, which changes whole maps in place, to the maps of these shards.

        ``parts`` are by parameter name, ``fused`` as in ``GroupUpdate``. Collective.
        """
        ...


@dataclass(frozen=True, slots=True)
class GroupUpdate:
    """The parameters of one group that have a gradient, and what an update rule needs of them.

    ``sharding`` is None where one process has all matrices. ``fused`` has the output widths of
    matrices that hold several maps, by name (``nn/fused_projections.py``).
    """

    names: Sequence[str]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[dict[str, Tensor]]
    lr: float
    weight_decay: float
    sharding: MatrixSharding | None = None
    fused: Mapping[str, Sequence[int]] = field(default_factory=dict)


@runtime_checkable
class UpdateRule(Protocol):
    """How an optimizer updates a group of tensors. Holds no tensors itself."""

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the zero state of one float32 tensor."""
        ...

    def apply(self, update: GroupUpdate) -> None:
        """Update ``params`` and ``states`` in place."""
        ...


class NamedOptimizer(torch.optim.Optimizer):
    """A torch optimizer of named parameter groups with update rules (see the module's docstring).

    Save and restore it with ``export_state`` and ``restore_state``: torch's ``load_state_dict``
    rounds state to the parameter's type.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        self.matrix_sharding: MatrixSharding | None = None
        self.fused_outputs: Mapping[str, Sequence[int]] = {}
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, without torch's decorator, which imports its compiler (seconds)."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002
        """Clear gradients, without torch's decorator (see ``add_param_group``)."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def ensure_state(self, parameter: Tensor, *, rule: UpdateRule) -> dict[str, Tensor]:
        """Return the parameter's state; create it, of zeros, if there is none yet."""
        state = self.state[parameter]
        parameter = local_tensor(parameter)
        if not state:
            if parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float()
            state.update(rule.initial_state(state.get("master", parameter)))
        return state

    def _step_group(self, group: dict[str, Any]) -> None:
        named = zip(group["param_names"], group["params"], strict=True)
        names, params = [], []
        for name, parameter in named:
            if parameter.grad is not None:
                names.append(name)
                params.append(parameter)
        if not params:
            return
        states = [self.ensure_state(p, rule=group["rule"]) for p in params]
        local = [local_tensor(p) for p in params]
        working = [state.get("master", p) for state, p in zip(states, local, strict=True)]
        group["rule"].apply(
            GroupUpdate(
                names,
                working,
                [local_tensor(p.grad).float() for p in params],
                states,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                sharding=self.matrix_sharding,
                fused=self.fused_outputs,
            )
        )
        for parameter, master in zip(local, working, strict=True):
            if master is not parameter:
                parameter.copy_(master)


def export_state(optimizer: NamedOptimizer) -> dict[str, Tensor]:
    """Return every state tensor (not copied). A parameter that was never updated has none."""
    return {
        f"{slot}/{name}": tensor
        for name, parameter, _ in _named_parameters(optimizer)
        for slot, tensor in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_state(optimizer: NamedOptimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore exported state bit for bit; the optimizer must have the same rules and parameters.

    All or nothing: raises CheckpointError naming what does not fit, with the optimizer unchanged.
    """
    stepped = {name.partition("/")[2] for name in tensors}
    slots = {
        name: _expected_state(parameter, rule=rule)
        for name, parameter, rule in _named_parameters(optimizer)
        if name in stepped
    }
    _check_state_fits(
        tensors, {f"{s}/{name}": like for name in slots for s, like in slots[name].items()}
    )
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
    kinds = (("missing", missing), ("unknown", unknown), ("of another shape", other))
    if any(names for _, names in kinds):
        found = "; ".join(f"{what}: {_name_some(names)}" for what, names in kinds if names)
        raise CheckpointError(
            f"the optimizer state does not fit: {found}. "
            "Resume with the model and the optimizer that the checkpoint was saved with."
        )


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
