"""Late updates: an expert whose gradient is zero is updated when it is next used, to the same bits.

Such an expert still changes in a step: its moments decay, and they and weight decay move its
weights. On a memory tier that moves all its states for little. Here the steps that an expert misses
are replayed, each with a gradient of zero and its own learning rate (clipping does not change a
zero): its weights before a forward pass multiplies them, its states in its next update. A forward
pass only reads states, so a full disk is met by updates alone.

Replaying costs the arithmetic of the missed steps, for AdamW on pieces that stay in a cache; for
Muon, whose momentum is orthogonalized anew in each step, it costs no less than updating in time,
and saves the bytes only.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import local_tensor
from moesaic.memory.tensor_store import Part
from moesaic.optim.group_update import GroupUpdate, UpdateRule
from moesaic.optim.tiered_states import ParameterRows

CACHED_VALUES = 1 << 15  # of one piece that is replayed: weights and two moments are 384 KiB


@dataclass(slots=True)
class ExpertBank:
    """This rank's weights ``[E, M, N]`` of experts, and how many updates each expert misses.

    ``group`` is the name of the parameter's group. ``resting`` is where the weights are between
    uses, if they are streamed. ``scalars`` are the step counts of each expert; empty: those of the
    parameter.
    """

    name: str
    parameter: nn.Parameter
    group: str
    resting: Tensor | None = None
    missed: list[int] = field(default_factory=list)
    missed_by_weights: list[int] = field(default_factory=list)
    scalars: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Have no expert miss anything."""
        self.missed = [0] * local_tensor(self.parameter).shape[0]
        self.missed_by_weights, self.scalars = list(self.missed), []

    def rows(self, expert: int) -> ParameterRows:
        """Return the rows of one expert."""
        return ParameterRows(Part(self.name, expert, expert + 1), self.parameter)

    def weights(self, expert: int) -> list[Tensor]:
        """Return one expert's weights, wherever they are; writing them is unknown to autograd."""
        places = [
            local_tensor(self.parameter.data),
            *([] if self.resting is None else [self.resting]),
        ]
        return [weights[expert : expert + 1] for weights in places]

    @property
    def late(self) -> list[int]:
        """The experts that miss something."""
        return [expert for expert, missed in enumerate(self.missed) if missed]

    def finish(self, shared: dict[str, Tensor]) -> None:
        """Note that no expert misses anything: step counts are ``shared`` again."""
        if self.scalars:
            shared.update(self.scalars[0])
        self.clear()


class LateUpdates:
    """What the experts of ``banks`` miss: at most ``max_steps`` updates each."""

    def __init__(self, banks: Iterable[ExpertBank] = (), *, max_steps: int = 0) -> None:
        self.banks = {bank.name: bank for bank in banks}
        self._max_steps = max_steps
        self._rates: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=max_steps))

    def of_group(self, group: str) -> list[ExpertBank]:
        """Return the banks of a group."""
        return [bank for bank in self.banks.values() if bank.group == group]

    def due(self, name: str, *, touched: Iterable[int]) -> list[ParameterRows]:
        """Return the experts of a bank that the present step updates."""
        bank = self.banks[name]
        too_late = (e for e, missed in enumerate(bank.missed) if missed == self._max_steps)
        return [bank.rows(expert) for expert in sorted({*touched, *too_late})]

    def scalars(self, rows: ParameterRows, *, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the step counts of some rows: ``shared`` by the parameter, or an expert's."""
        bank = self.banks.get(rows.part.name)
        if bank is None:
            return shared
        if not bank.scalars:
            bank.scalars = [{s: t.clone() for s, t in shared.items()} for _ in bank.missed]
        return bank.scalars[rows.part.start]

    def replay(self, rule: UpdateRule, update: GroupUpdate, rows: ParameterRows) -> None:
        """Apply to the one member of ``update``, all of whose state is there, what it misses."""
        bank = self.banks.get(rows.part.name)
        if bank is None or not bank.missed[rows.part.start]:
            return
        missed, weights_miss = (m[rows.part.start] for m in (bank.missed, bank.missed_by_weights))
        rates = list(self._rates[bank.group])[-missed:]
        (values,) = update.params
        # a master in the states misses what they miss; weights have had the first of the steps
        is_state = any(values is tensor for tensor in update.states[0].values())
        ahead = 0 if is_state else missed - weights_miss
        each = replace(update, grads=[torch.zeros_like(values)], narrow=[None])
        _replay(rule, replace(each, params=[values.clone()]), rates[:ahead])
        _replay(rule, each, rates[ahead:])
        update.round_masters()  # no update may follow

    def mark_updated(self, rows: ParameterRows) -> None:
        """Note that weights and states of some rows are up to date."""
        bank = self.banks.get(rows.part.name)
        if bank is not None:
            bank.missed[rows.part.start] = bank.missed_by_weights[rows.part.start] = 0

    def finish_step(self, group: str, *, lr: float, updated: Sequence[ParameterRows]) -> None:
        """Note a step of a group: experts that were not updated miss it."""
        now = {(rows.part.name, rows.part.start) for rows in updated}
        for bank in self.of_group(group):
            for expert in range(len(bank.missed)):
                if (bank.name, expert) not in now:
                    bank.missed[expert] += 1
                    bank.missed_by_weights[expert] += 1
        self._rates[group].append(lr)

    def clear(self) -> None:
        """Have no expert miss anything."""
        for bank in self.banks.values():
            bank.clear()


def _replay(rule: UpdateRule, update: GroupUpdate, rates: Sequence[float]) -> None:
    if rates:
        for piece in update.pieces(CACHED_VALUES) if rule.elementwise else [update]:
            for lr in rates:
                rule.apply(replace(piece, lr=lr))
