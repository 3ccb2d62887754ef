"""NamedOptimizer: one ``torch.optim.Optimizer`` whose groups each follow their own update rule.

Every group has a ``name`` (``adamw/norm``), a ``rule`` (how its tensors change), ``lr`` and
``base_lr``: a schedule writes ``lr = base_lr * factor``. All state is float32, and of the part
of a parameter that this rank holds. A parameter of a
narrower type (bfloat16) keeps a float32 ``master`` copy that the rule updates and that is rounded
into the parameter afterwards, so that small updates are not lost.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from moesaic.core.shapes import Tensor
from moesaic.dist.local import local_tensor


@runtime_checkable
class UpdateRule(Protocol):
    """How a group of tensors follows its gradients. Holds no tensors."""

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the zero state of one float32 tensor."""
        ...

    def apply(
        self,
        params: Sequence[Tensor],
        *,
        grads: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        group: Mapping[str, Any],
        sharding: "MatrixSharding",
    ) -> None:
        """Update ``params`` and ``slots`` in place, by the group's ``lr`` and ``weight_decay``.

        ``group["updated"]`` names the parameters.
        """
        ...


@runtime_checkable
class MatrixSharding(Protocol):
    """Where a rule that needs whole matrices finds them, by the names of their parameters."""

    def all_gather_matrices(self, names: Sequence[str], parts: Sequence[Tensor]) -> list[Tensor]:
        """Return what these are parts of."""
        ...

    def local_shards(self, names: Sequence[str], whole: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of whole matrices that are held here."""
        ...


class UnshardedMatrices:
    """Whole matrices are held here."""

    def all_gather_matrices(self, names: Sequence[str], parts: Sequence[Tensor]) -> list[Tensor]:
        del names
        return list(parts)

    def local_shards(self, names: Sequence[str], whole: Sequence[Tensor]) -> list[Tensor]:
        del names
        return list(whole)


class NamedOptimizer(torch.optim.Optimizer):
    """See the module's first lines. Save and restore it with ``optim.state``, by parameter name.

    (Torch's own ``load_state_dict`` rounds state to the parameter's type; ours does not.)
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        self.matrix_sharding: MatrixSharding = UnshardedMatrices()
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, without the decorator of torch's own that imports its compiler (seconds)."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002
        """Forget gradients; likewise."""
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
        """Return the parameter's state, made of zeros where it has none yet."""
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
        slots = [self.ensure_state(p, rule=group["rule"]) for p in params]
        grads = [local_tensor(p.grad).float() for p in params]
        params = [local_tensor(p) for p in params]
        working = [s.get("master", p) for s, p in zip(slots, params, strict=True)]
        group["rule"].apply(
            working,
            grads=grads,
            slots=slots,
            group={**group, "updated": names},
            matrices=self.matrix_sharding,
        )
        for parameter, master in zip(params, working, strict=True):
            if master is not parameter:
                parameter.copy_(master)
