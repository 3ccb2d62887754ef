"""Wire: what crosses a boundary between two stages, as tensors whose shape both sides know before.

Micro-batches of a step differ in their tokens, so rows are filled up to the most of any of them.

Letters: R rows on the wire, T tokens of the stack in progress, S source tokens, D model dim,
C columns that linked routers carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.model.config import ModelConfig
from moesaic.moe.router_logits import RouterStateWidths
from moesaic.parallel.partial_forward import (
    BlockRange,
    StageIO,
    attach_loss,
    connect_graph,
    router_state_widths,
)


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """How many tokens of a micro-batch are held here."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StageBoundary:
    """Between two legs: whether states of a stack in progress cross, and those of the source."""

    stack: str
    sends_memory: bool
    router_state: RouterStateWidths

    @staticmethod
    def after(leg: BlockRange, *, config: ModelConfig) -> "StageBoundary":
        """Return the boundary at the end of a leg."""
        first = config.encoder.layers
        if leg.decoder:
            return StageBoundary(
                "target",
                sends_memory=bool(first),
                router_state=router_state_widths(config, config.decoder),
            )
        if leg.encoder.stop < first:
            return StageBoundary(
                "source",
                sends_memory=False,
                router_state=router_state_widths(config, config.encoder),
            )
        return StageBoundary("", sends_memory=True, router_state=RouterStateWidths())

    def num_states(self, tokens: LocalTokens) -> int:
        """Return the T of a micro-batch."""
        return {"source": tokens.source, "target": tokens.target, "": 0}[self.stack]

    def num_rows(self, tokens: LocalTokens) -> int:
        """Return the rows of a micro-batch that cross."""
        return self.num_states(tokens) + (tokens.source if self.sends_memory else 0)


@dataclass(frozen=True, slots=True)
class StageSerializer:
    """A boundary with room for every micro-batch of a step; values are of ``dtype``."""

    boundary: StageBoundary
    dim: int
    dtype: torch.dtype
    rows: int
    router_state_rows: int

    @staticmethod
    def of(
        boundary: StageBoundary, *, dim: int, dtype: torch.dtype, tokens: Sequence[LocalTokens]
    ) -> "StageSerializer":
        """Make room, a little more than is needed, so that most steps need the same."""
        rows = round_up_rows(max(boundary.num_rows(each) for each in tokens))
        carried = round_up_rows(max(boundary.num_states(each) for each in tokens))
        columns = boundary.router_state.hidden + boundary.router_state.logits
        return StageSerializer(boundary, dim, dtype, rows, carried if columns else 0)

    @property
    def router_state_columns(self) -> int:
        """What linked routers carry of a token."""
        return self.boundary.router_state.hidden + self.boundary.router_state.logits

    def empty_buffers(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """Return tensors of the shapes that cross."""
        blank = torch.empty(self.rows, self.dim, dtype=self.dtype, device=device)
        if not self.router_state_columns:
            return (blank.requires_grad_(),)
        carried = torch.empty(self.router_state_rows, self.router_state_columns, device=device)
        return blank.requires_grad_(), carried.requires_grad_()

    def pack(self, handed: StageIO, *, term: Float[Tensor, ""]) -> tuple[Tensor, ...]:
        """Return what crosses. Its backward also adds 1 to the gradient of ``term``, a loss."""
        there = [states for states in (handed.x, handed.encoder_states) if states is not None]
        there[0] = attach_loss(there[0], term)
        rows = _pad_rows(there, rows=self.rows).to(self.dtype)
        if not self.router_state_columns or handed.x is None:
            return (rows,)
        tokens, carried = handed.x.shape[0], self.boundary.router_state
        columns = [
            rows.new_zeros(tokens, width, dtype=torch.float32) if value is None else value
            for value, width in (
                (handed.router_hidden, carried.hidden),
                (handed.router_logits, carried.logits),
            )
        ]
        # before the first router nothing is carried; the zeros then need a graph all the same
        joined = connect_graph(torch.cat(columns, 1), handed.x)
        return rows, _pad_rows([joined], rows=self.router_state_rows)

    def unpack(self, crossed: Sequence[Tensor], *, tokens: LocalTokens) -> StageIO:
        """Return what was handed on, of a micro-batch of so many tokens."""
        boundary, states = self.boundary, self.boundary.num_states(tokens)
        x = crossed[0][:states] if boundary.stack else None
        memory = crossed[0][states : states + tokens.source] if boundary.sends_memory else None
        if x is None or not self.router_state_columns:
            return StageIO(x, encoder_states=memory)
        carried = crossed[1][:states]
        # what no router reads has a gradient all the same, zero
        x = connect_graph(x, carried)
        hidden, logits = carried.split(
            [boundary.router_state.hidden, boundary.router_state.logits], 1
        )
        return StageIO(
            x, hidden if hidden.shape[1] else None, logits if logits.shape[1] else None, memory
        )


def round_up_rows(rows: int) -> int:
    """Round up by at most an eighth, to one of few numbers."""
    step = 1 << max(0, rows.bit_length() - 4)
    return max(1, -(-rows // step) * step)


def _pad_rows(parts: Sequence[Tensor], *, rows: int) -> Tensor:
    """Put tensors under one another, and zeros below."""
    lacking = rows - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(lacking, *parts[0].shape[1:])])
