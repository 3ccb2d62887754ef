"""NamedOptimizer: a ``torch.optim.Optimizer`` whose groups have update rules and parameter names.

Every group has a ``name`` (``adamw/norm``), a ``rule`` (its update), ``lr`` and ``base_lr``: a
schedule writes ``lr = base_lr * factor``. State is float32 and covers the shard of a parameter that
is on this rank. What a rule updates of a parameter of a narrower dtype (bfloat16), and how it is
rounded into the parameter, is up to ``optim/master_weights.py``.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.tensor_store import Access, FetchedTensors, Part, Place
from moesaic.ops.stochastic_rounding import ShardPosition
from moesaic.optim.gradients import Gradients, ResidentGradients
from moesaic.optim.group_update import GroupUpdate, MatrixSharding, UpdateRule
from moesaic.optim.late_updates import ExpertBank, LateUpdates
from moesaic.optim.master_weights import MasterWeights, ShardUpdate
from moesaic.optim.tiered_states import ParameterRows, TieredStates, UpdatedWeights
from moesaic.optim.weight_transfers import WeightTransfers

MASTER = "master"  # the slot of a float32 copy
MAX_COPIED_BYTES = 1 << 28  # float32 copies of narrow gradients at a time
MAX_BATCHED_BYTES = 1 << 22  # states of small tensors that one call updates


class NamedOptimizer(torch.optim.Optimizer):
    """A torch optimizer of named parameter groups with update rules (see the module's docstring).

    Save and restore it as ``optimizer_state.py`` does: torch's ``load_state_dict`` rounds state to
    the parameter's type.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, master_weights: MasterWeights) -> None:
        super().__init__(groups, defaults={})
        self.master_weights, self.steps_taken = master_weights, 0
        # where the shard of a parameter is in the whole one; parallel plans replace it
        self.position_of: Callable[[str], ShardPosition] | None = None
        self.matrix_sharding: MatrixSharding | None = None
        self.fused_outputs: Mapping[str, Sequence[int]] = {}
        self.gradients: Gradients = ResidentGradients()
        self.tier: TieredStates | None = None  # states that are not on the device
        self.updated_weights = UpdatedWeights()
        self.weights = WeightTransfers(self._write_back, self._has_master)
        self.late = LateUpdates()
        # parameters that the present step has updated already, and the rows that it has
        self.updated: dict[str, list[ParameterRows]] = {}
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, without torch's decorator, which imports its compiler (seconds)."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002
        """Clear gradients, without torch's decorator (see ``add_param_group``)."""
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)
        self.gradients.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Raises DiskFullError, with nothing updated, if a memory tier has no room for a state.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.reserve()
        self.weights.discard()
        for group in self.param_groups:
            members = self._members(group)
            waiting = [rows for rows in members if rows.part.name not in self.updated]
            place, buckets = self._place(group["rule"]), self._buckets(waiting, rule=group["rule"])
            for bucket, following in pairwise((*buckets, ())):
                self.weights.prefetch(bucket, place=place)
                self.weights.prefetch(following, place=place)
                self.update_bucket(group, bucket)
            self.late.finish_step(group["name"], lr=group["lr"], updated=members)
        self.weights.join()
        self.updated = {}
        self.steps_taken += 1
        return loss

    def reserve(self) -> None:
        """Take the room on a memory tier that an update needs. Raises DiskFullError."""
        if self.tier is not None:
            self.tier.reserve([row for group in self.param_groups for row in self._members(group)])

    def ensure_state(self, name: str, parameter: Tensor, *, rule: UpdateRule) -> dict[str, Tensor]:
        """Return a parameter's state on the device; create it, of zeros, if there is none yet."""
        state = self.state[parameter]
        local = local_tensor(parameter)
        if state:
            return state
        if self.tier is None:
            state.update(self._initial_state(local, rule=rule))
            return state
        expected = self.expected_state(parameter, rule=rule)
        self.tier.allocate(name, expected)
        state.update({slot: torch.zeros(()) for slot, like in expected.items() if not like.dim()})
        if not local.is_meta and "master" in expected:
            self.tier.live(name)["master"].copy_(local)
        return state

    def expected_state(self, parameter: Tensor, *, rule: UpdateRule) -> dict[str, Tensor]:
        """Return the shapes and dtypes of a parameter's state, on the meta device."""
        return self._initial_state(local_tensor(parameter).detach().to("meta"), rule=rule)

    def _initial_state(self, parameter: Tensor, *, rule: UpdateRule) -> dict[str, Tensor]:
        if parameter.dtype == torch.float32:
            return rule.initial_state(parameter)
        kept = self.master_weights.initial_state(parameter)
        like = kept.get(MASTER, torch.empty_like(parameter, dtype=torch.float32))
        return kept | rule.initial_state(like)

    def _members(self, group: dict[str, Any]) -> list[ParameterRows]:
        """Return the parameters of a group that have a gradient, with their states made."""
        members = []
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if self.gradients.has(parameter):
                members += self.due(name, parameter, rule=group["rule"])
        return members

    def due(self, name: str, parameter: Tensor, *, rule: UpdateRule) -> list[ParameterRows]:
        """Return the rows of a parameter that the present step updates, with their state made."""
        if name in self.updated:
            return self.updated[name]
        self.ensure_state(name, parameter, rule=rule)
        if name in self.late.banks:
            return self.late.due(name, touched=self.gradients.touched(parameter))
        return [ParameterRows(Part(name), parameter)]

    def _buckets(
        self, members: Sequence[ParameterRows], *, rule: UpdateRule
    ) -> Iterator[Sequence[ParameterRows]]:
        """Split a group so that copies in float32, or from a tier, are few at a time.

        Small parts from a tier are updated in one call; larger ones one by one, so that a part is
        computed with while the one before it is written.
        Rules that are not elementwise batch matrices of one shape, so their groups stay whole.
        """
        tier = self.tier
        if tier is not None and rule.elementwise:
            parts = [part for rows in members for part in tier.split(rows)]
            most = min(tier.in_flight_bytes // 2, MAX_BATCHED_BYTES)
            yield from _filled(parts, size=tier.num_bytes, most=most)
            return
        banks = self.late.banks
        yield from _filled(
            [rows for rows in members if rows.part.name not in banks],
            size=_copied_bytes if rule.elementwise else lambda _: 0,
            most=MAX_COPIED_BYTES,
        )
        yield [rows for rows in members if rows.part.name in banks]

    @torch.no_grad()
    def catch_up_weights(self, bank: ExpertBank, expert: int) -> dict[str, Tensor]:
        """Bring the weights of an expert up to date, before they are used; states are only read.

        Returns a copy of its states that is up to date.
        """
        rows, weights = bank.rows(expert), bank.weights(expert)
        group = next(group for group in self.param_groups if group["name"] == bank.group)
        place = self._place(group["rule"])
        states, held = self._fetch_states([rows], place=place, access=Access.READ)
        state = {slot: tensor.clone() for slot, tensor in states[0].items()}
        values = self._float32_values(weights[0], state)
        # a streamed weight may be in use on the device, or at rest
        values = values.to(next((t.device for t in state.values() if t.dim()), values.device))
        update = self._group_update(group, [rows], weights=[values], states=[state])
        held.release()
        self.late.replay(group["rule"], replace(update, params=[values], states=[state]), rows)
        for each in weights:
            each.copy_(values)
        bank.missed_by_weights[expert] = 0
        return state

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring the weights and states of all experts up to date (see ``late_updates.py``)."""
        groups = {group["name"]: group for group in self.param_groups}
        for bank in self.late.banks.values():
            for expert in bank.late:
                with self.bucket(groups[bank.group], [bank.rows(expert)]):
                    pass  # gradients of zero alone
            bank.finish(self.state[bank.parameter])
        self.weights.join()

    def _place(self, rule: UpdateRule) -> Place:
        return Place.HOST if self.tier is not None and rule.elementwise else Place.DEVICE

    def update_bucket(
        self,
        group: dict[str, Any],
        members: Sequence[ParameterRows],
        *,
        before: Callable[[GroupUpdate], None] | None = None,
    ) -> None:
        """Update members of a group by their gradients; ``before`` gets what is updated first."""
        if not members:
            return
        with self.bucket(group, members) as update:
            parts = [(rows.part, rows.parameter) for rows in members]
            with self.gradients.fetch(parts, place=self._place(group["rule"])) as grads:
                if before is not None:
                    before(update)
                group["rule"].apply(replace(update, grads=grads))

    @contextmanager
    def bucket(
        self, group: dict[str, Any], members: Sequence[ParameterRows]
    ) -> Iterator[GroupUpdate]:
        """Yield members, without gradients, that miss no update; write them back afterwards."""
        place = self._place(group["rule"])
        weights = self.weights.fetch(members, place=place, access=Access.UPDATE)
        states, held = self._fetch_states(members, place=place, access=Access.UPDATE)
        local = weights.wait()
        update = self._group_update(group, members, weights=local, states=states)
        working = update.params
        for index, rows in enumerate(members if self.late.banks else ()):
            self.late.replay(group["rule"], update.member(index), rows)
        yield update
        for rows, parameter, values in zip(members, local, working, strict=True):
            if values is not parameter:
                self._write_back(rows, parameter, values)
        if self.tier is not None:  # else these are the states themselves
            for rows, state in zip(members, states, strict=True):
                self._keep_scalars(rows, state)
        held.release()
        weights.release()

    def _keep_scalars(self, rows: ParameterRows, state: Mapping[str, Tensor]) -> None:
        self.late.mark_updated(rows)
        if rows.is_last or rows.part.name in self.late.banks:  # each part has counted the step
            kept = self.late.scalars(rows, shared=self.state[rows.parameter])
            kept.update({slot: state[slot] for slot in kept})

    def _group_update(
        self,
        group: dict[str, Any],
        members: Sequence[ParameterRows],
        *,
        weights: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> GroupUpdate:
        working = [self._float32_values(*pair) for pair in zip(weights, states, strict=True)]
        rounds = self.master_weights.rounds_to_nearest
        return GroupUpdate(
            [rows.part.name for rows in members],
            working,
            (),
            states,
            [p if w is not p and rounds else None for w, p in zip(working, weights, strict=True)],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            sharding=None if members[0].part.name in self.late.banks else self.matrix_sharding,
            fused=self.fused_outputs,
        )

    def _fetch_states(
        self, members: Sequence[ParameterRows], *, place: Place, access: Access
    ) -> tuple[list[dict[str, Tensor]], FetchedTensors]:
        """Return each member's state at ``place``, and the handle that writes it back."""
        resident = [self.late.scalars(rows, shared=self.state[rows.parameter]) for rows in members]
        for rows in members:
            reads = not self._has_master(rows.parameter)
            self.updated_weights.count(rows, place=place, reads=reads)
        if self.tier is None:
            return resident, FetchedTensors(list[Tensor], lambda: None)
        stored, held = self.tier.fetch(members, place=place, access=access)
        scalars = [{slot: t.clone() for slot, t in state.items()} for state in resident]
        return [a | b for a, b in zip(stored, scalars, strict=True)], held

    def _has_master(self, parameter: Tensor) -> bool:
        return parameter.dtype != torch.float32 and self.master_weights.rounds_to_nearest

    def _float32_values(self, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        return self.master_weights.float32_values(parameter, state)

    def _write_back(self, rows: ParameterRows, weights: Tensor, values: Tensor) -> None:
        name, local = rows.part.name, local_tensor(rows.parameter)
        whole = ShardPosition.of_whole(local.shape)
        position = whole if self.position_of is None else self.position_of(name)
        position = position.rows(rows.part.start, rows.part.stop)
        update = ShardUpdate(name, self.steps_taken, position)
        self.master_weights.write_back(weights, values, update=update)


def _filled(
    members: Sequence[ParameterRows], *, size: Callable[[ParameterRows], int], most: int
) -> Iterator[Sequence[ParameterRows]]:
    """Yield members in lists of at most so many bytes, or of one."""
    bucket: list[ParameterRows] = []
    filled = 0
    for rows in members:
        num_bytes = size(rows)
        if bucket and filled + num_bytes > most:
            yield bucket
            bucket, filled = [], 0
        bucket.append(rows)
        filled += num_bytes
    if bucket:
        yield bucket


def _copied_bytes(rows: ParameterRows) -> int:
    narrow = rows.parameter.dtype != torch.float32
    return 4 * local_tensor(rows.parameter).numel() if narrow else 0
