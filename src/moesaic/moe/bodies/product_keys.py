"""Product keys: the best of n * n slots, found by scoring n rows and n columns.

Letters: T tokens, D model dim, n keys per side, b best of a side, m slots read, r rank of the core,
d key dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.start import CustomInitializers, Initializer


@dataclass(frozen=True, slots=True)
class SlotScores:
    """The slots that each token reads, best first, and their scores (float32, in the graph)."""

    slot: Int[Tensor, "T m"]
    score: Float[Tensor, "T m"]


class ProductKeys(CustomInitializers):
    """Keys of both sides, one query per rank and side, and the core that joins them."""

    def __init__(self, *, dim: int, keys_per_side: int, num_slots_read: int, rank: int, key_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, 2 * rank * key_dim, bias=False)
        self.row = nn.Parameter(torch.empty(keys_per_side, key_dim))
        self.column = nn.Parameter(torch.empty(keys_per_side, key_dim))
        self.core_change = nn.Parameter(torch.empty(rank, rank))
        self.keys_per_side, self.num_slots_read, self.rank = keys_per_side, num_slots_read, rank

    def initializers(self) -> Mapping[str, Initializer]:
        return {
            "query.weight": Initializer(kind="router"),
            "row": Initializer(kind="router", std=1.0),
            "column": Initializer(kind="router", std=1.0),
            "core_change": Initializer(kind="router", std=0.0),
        }

    @property
    def core(self) -> Float[Tensor, "r r"]:
        """C: what is learned is how it differs from 1 / r."""
        return self.core_change + 1 / self.rank

    def forward(self, x: Float[Tensor, "T D"]) -> SlotScores:
        """Return each token's best slots. Float32 throughout, since it decides."""
        with torch.autocast(x.device.type, enabled=False):
            query = unit_rms(self.query(x.float()).unflatten(-1, (2, self.rank, -1)))
            row, column = (
                torch.einsum("trd,nd->trn", asked, unit_rms(key)) / key.shape[1] ** 0.5
                for asked, key in zip(query.unbind(1), (self.row, self.column), strict=True)
            )
            return self._top_slots(row, column=column)

    def _top_slots(self, row: Float[Tensor, "T r n"], *, column: Float[Tensor, "T r n"]) -> SlotScores:
        left, right = leading_singular_vectors(self.core.detach())
        best = min(self.num_slots_read, self.keys_per_side)
        rows = (left @ row.detach()).topk(best).indices
        columns = (right @ column.detach()).topk(best).indices
        near = row.gather(2, rows[:, None].expand(-1, self.rank, -1))
        far = column.gather(2, columns[:, None].expand(-1, self.rank, -1))
        grid = (self.core.t() @ near).transpose(1, 2) @ far  # [T, b, b]
        chosen = grid.detach().flatten(1).topk(self.num_slots_read).indices
        slot = rows.gather(1, chosen // best) * self.keys_per_side + columns.gather(1, chosen % best)
        return SlotScores(slot, grid.flatten(1).gather(1, chosen))


def leading_singular_vectors(
    core: Float[Tensor, "r r"],
) -> tuple[Float[Tensor, "r"], Float[Tensor, "r"]]:
    """The left and right vectors of the largest singular value, the left one's sum not negative.

    Without a rule for the sign, "best" could as well mean the smallest scores (the released code
    follows the sign of the step before; a rule of the core alone needs no memory of it).
    """
    left, _, right = torch.linalg.svd(core)
    turn = torch.where(left[:, 0].sum() < 0, -1.0, 1.0)
    return turn * left[:, 0], turn * right[0]


def unit_rms(x: Float[Tensor, "*N d"]) -> Float[Tensor, "*N d"]:
    """Vectors scaled to a root mean square of 1."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
