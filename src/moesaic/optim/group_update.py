"""Group update: what an update rule gets, and the protocols of rules and of exchanged matrices."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
        return replace(
            self,
            names=self.names[one],
            params=self.params[one],
            grads=self.grads[one],
            states=self.states[one],
            narrow=self.narrow[one],
        )

    def pieces(self, values: int) -> Iterator["GroupUpdate"]:
        """Split one member into rows of about so many values, which share its memory.

        A rule counts a step for each piece, so all but the last count in a copy.
        """
        (whole,), (grad,), (state,), (narrow,) = self.params, self.grads, self.states, self.narrow
        rows = max(1, values // max(1, whole.shape[-1]))
        split = partial(_split_rows, rows=rows)
        params, grads = split(whole), split(grad)
        rounded = [None] * len(params) if narrow is None else split(narrow)
        states = {slot: split(t) for slot, t in state.items() if t.dim()}
        scalars = {slot: t for slot, t in state.items() if not t.dim()}
        for index, (param, piece, to) in enumerate(zip(params, grads, rounded, strict=True)):
            is_last = index == len(params) - 1
            counted = scalars if is_last else {slot: t.clone() for slot, t in scalars.items()}
            parts = {slot: pieces[index] for slot, pieces in states.items()} | counted
            yield replace(self, params=[param], grads=[piece], states=[parts], narrow=[to])

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

    ``elementwise``: the update of a value depends on no value of another row. ``state_blocks`` has
    the states with one number for so many values of a row; the others have the parameter's shape.
    """

    elementwise: ClassVar[bool]

    @property
    def state_blocks(self) -> Mapping[str, int]:
        """The number of values that share a number of a state, by slot."""
        ...

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the zero state of one float32 tensor."""
        ...

    def apply(self, update: GroupUpdate) -> None:
        """Update ``params``, ``states`` and ``narrow`` in place."""
        ...


def _split_rows(tensor: Tensor, *, rows: int) -> Sequence[Tensor]:
    """Return views of so many rows of the last dim each."""
    return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1]).split(rows)
