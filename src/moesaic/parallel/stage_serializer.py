"""Stage serializer: packs what one pipeline stage sends to the next into tensors of fixed shape.

Both stages compute the shapes without communication. Micro-batches of a step differ in their number
of tokens, so rows are padded to the largest of them.

Letters: T tokens of the current stack, D model dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moesaic.core.shapes import Float, Tensor
from moesaic.model.config import ModelConfig
from moesaic.moe.router_gate import RouterStateWidths
from moesaic.parallel.partial_forward import (
    BlockRange,
    StageIO,
    attach_loss,
    connect_graph,
    router_state_widths,
)


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """The numbers of tokens of a micro-batch that this rank holds."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StageBoundary:
    """What is sent between two pipeline stages.

    ``stack`` is the stack whose hidden states are sent ("source", "target", or "" between the two),
    ``sends_encoder_states`` whether encoder outputs are. ``router_state`` has the widths of what
    cross-layer routers pass on.
    """

    stack: str
    sends_encoder_states: bool
    router_state: RouterStateWidths

    @staticmethod
    def after(blocks: BlockRange, *, config: ModelConfig) -> "StageBoundary":
        """Return the boundary after a stage of these blocks."""
        layers = config.encoder.layers
        if blocks.decoder:
            widths = router_state_widths(config, config.decoder)
            return StageBoundary("target", sends_encoder_states=layers > 0, router_state=widths)
        if blocks.encoder.stop < layers:
            widths = router_state_widths(config, config.encoder)
            return StageBoundary("source", sends_encoder_states=False, router_state=widths)
        return StageBoundary("", sends_encoder_states=True, router_state=RouterStateWidths())

    def num_states(self, tokens: LocalTokens) -> int:
        """Return how many hidden states of the stack are sent: T of a micro-batch."""
        return {"source": tokens.source, "target": tokens.target, "": 0}[self.stack]

    def num_rows(self, tokens: LocalTokens) -> int:
        """Return how many rows of a micro-batch are sent, encoder outputs included."""
        return self.num_states(tokens) + (tokens.source if self.sends_encoder_states else 0)


@dataclass(frozen=True, slots=True)
class StageSerializer:
    """Serializes the outputs of a stage, with rows for the largest micro-batch of a step."""

    boundary: StageBoundary
    dim: int
    dtype: torch.dtype
    rows: int
    router_state_rows: int

    @staticmethod
    def of(
        boundary: StageBoundary, *, dim: int, dtype: torch.dtype, tokens: Sequence[LocalTokens]
    ) -> "StageSerializer":
        """Return the serializer of a step; rows are rounded up, so that most steps share one."""
        rows = round_up_rows(max(map(boundary.num_rows, tokens)))
        states = round_up_rows(max(map(boundary.num_states, tokens)))
        columns = boundary.router_state.hidden + boundary.router_state.logits
        return StageSerializer(boundary, dim, dtype, rows, states if columns else 0)

    @property
    def router_state_columns(self) -> int:
        """The values per token that cross-layer routers pass on."""
        return self.boundary.router_state.hidden + self.boundary.router_state.logits

    def empty_buffers(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """Return uninitialized tensors of the shapes that are sent."""
        rows = torch.empty(self.rows, self.dim, dtype=self.dtype, device=device)
        if not self.router_state_columns:
            return (rows.requires_grad_(),)
        router = torch.empty(self.router_state_rows, self.router_state_columns, device=device)
        return rows.requires_grad_(), router.requires_grad_()

    def pack(self, output: StageIO, *, term: Float[Tensor, ""]) -> tuple[Tensor, ...]:
        """Return the tensors to send. Their backward also adds 1 to the gradient of a loss term."""
        states = [each for each in (output.x, output.encoder_states) if each is not None]
        states[0] = attach_loss(states[0], term)
        rows = _pad_rows(states, rows=self.rows).to(self.dtype)
        if not self.router_state_columns or output.x is None:
            return (rows,)
        tokens, widths = output.x.shape[0], self.boundary.router_state
        columns = [
            rows.new_zeros(tokens, width, dtype=torch.float32) if value is None else value
            for value, width in (
                (output.router_hidden, widths.hidden),
                (output.router_logits, widths.logits),
            )
        ]
        # before the first router these are constant zeros, without an autograd graph of their own
        router = connect_graph(torch.cat(columns, 1), output.x)
        return rows, _pad_rows([router], rows=self.router_state_rows)

    def unpack(self, received: Sequence[Tensor], *, tokens: LocalTokens) -> StageIO:
        """Return the stage input of a micro-batch from the tensors that were received."""
        boundary, count = self.boundary, self.boundary.num_states(tokens)
        x = received[0][:count] if boundary.stack else None
        memory = (
            received[0][count : count + tokens.source] if boundary.sends_encoder_states else None
        )
        if x is None or not self.router_state_columns:
            return StageIO(x, encoder_states=memory)
        router, widths = received[1][:count], boundary.router_state
        # columns that no router reads must have a gradient, too: zero
        x = connect_graph(x, router)
        hidden, logits = router.split([widths.hidden, widths.logits], 1)
        return StageIO(
            x, hidden if hidden.shape[1] else None, logits if logits.shape[1] else None, memory
        )


def round_up_rows(rows: int) -> int:
    """Round up by at most an eighth, to one of few sizes."""
    step = 1 << max(0, rows.bit_length() - 4)
    return max(1, -(-rows // step) * step)


def _pad_rows(parts: Sequence[Tensor], *, rows: int) -> Tensor:
    """Concatenate rows and pad them with zeros to ``rows``."""
    missing = rows - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(missing, *parts[0].shape[1:])])
