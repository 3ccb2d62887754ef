"""AdamW with moments in 8 bits between steps (Dettmers et al. 2022, arXiv:2110.02861).

A step makes them float32 again, a piece that stays in a cache at a time, updates as AdamW does, and
quantizes them anew. Blocks end with rows, so the rows of a shard, of an expert or of a part that a
memory tier lends have the bits that they have in the whole tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moesaic.core.shapes import Tensor
from moesaic.ops.blockwise_quantization import blocks_per_row, dequantize, quantize
from moesaic.ops.chunk_sizes import chunk_sizes
from moesaic.optim.group_update import GroupUpdate
from moesaic.optim.update_rules import AdamWRule

IS_SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the second moment is never negative


@dataclass(frozen=True, slots=True)
class EightBitAdamWRule:
    """State per parameter: AdamW's moments as codes (uint8), and ``exp_avg_scale`` and
    ``exp_avg_sq_scale`` of one float32 number for each ``block`` values of a row.
    """

    elementwise: ClassVar[bool] = True
    float32: AdamWRule
    block: int

    @property
    def state_blocks(self) -> Mapping[str, int]:
        return {f"{slot}_scale": self.block for slot in IS_SIGNED}

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.float32.initial_state(parameter.new_zeros(()))
        scales = (*parameter.shape[:-1], blocks_per_row(parameter.shape[-1], block=self.block))
        for slot in IS_SIGNED:
            state[slot] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{slot}_scale"] = torch.zeros(scales, device=parameter.device)
        return state

    def apply(self, update: GroupUpdate) -> None:
        for index, parameter in enumerate(update.params):
            values = chunk_sizes(parameter.device).float32 // parameter.itemsize
            for piece in update.member(index).pieces(values):
                self._update_piece(piece)

    def _update_piece(self, piece: GroupUpdate) -> None:
        (state,) = piece.states
        moments = {
            slot: dequantize(state[slot], state[f"{slot}_scale"], block=self.block, signed=signed)
            for slot, signed in IS_SIGNED.items()
        }
        self.float32.apply(replace(piece, states=[{**moments, "step": state["step"]}]))
        for slot, signed in IS_SIGNED.items():
            codes, scales = quantize(moments[slot], block=self.block, signed=signed)
            state[slot].copy_(codes)
            state[f"{slot}_scale"].copy_(scales)
