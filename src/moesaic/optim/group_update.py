"""Group update: what an update rule gets, and the protocols of rules and of exchanged matrices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

from moesaic.core.shapes import Tensor


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

    ``grads`` have the types of the gradients; they are empty until they are fetched. ``narrow`` has
    the parameter whose float32 master is in ``params``, or None: a rule rounds the master into it.
    ``sharding`` is None where one process has all matrices. ``fused`` has the output widths of
    matrices that hold several maps, by name (``nn/fused_projections.py``).
    """

    names: Sequence[str]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[dict[str, Tensor]]
    narrow: Sequence[Tensor | None]
    lr: float
    weight_decay: float
    sharding: MatrixSharding | None = None
    fused: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def member(self, index: int) -> "GroupUpdate":
        """Return the update of one parameter."""
        one = slice(index, index + 1)
        names, params, states = self.names[one], self.params[one], self.states[one]
        return replace(self, names=names, params=params, states=states, narrow=self.narrow[one])

    def float_grads(self) -> list[Tensor]:
        """Return the gradients in float32."""
        return [grad.float() for grad in self.grads]

    def round_masters(self) -> None:
        """Round every float32 master into its parameter."""
        for narrow, master in zip(self.narrow, self.params, strict=True):
            if narrow is not None:
                narrow.copy_(master)


@runtime_checkable
class UpdateRule(Protocol):
    """How an optimizer updates a group of tensors. Holds no tensors itself.

    ``elementwise``: the update of a value depends on no other value.
    """

    elementwise: ClassVar[bool]

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the zero state of one float32 tensor."""
        ...

    def apply(self, update: GroupUpdate) -> None:
        """Update ``params``, ``states`` and ``narrow`` in place."""
        ...
