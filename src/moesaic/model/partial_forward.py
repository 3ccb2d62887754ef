"""Leg: a run of a model's blocks, and what one leg hands to the next.

The chain of a model is the encoder's blocks, then the decoder's. A pass may stop between any two
and go on elsewhere: what else a leg needs (packing, rotation, labels) it makes of its own copy of
the batch.

Letters: T tokens of the stack in progress, S source tokens, D model dim, P width of a router's
state, E experts.
"""

from dataclasses import dataclass

from moesaic.core.shapes import Float, Tensor
from moesaic.model.block import (
    BlockState,
    ForwardContext,
    Records,
)
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.kv_cache import EncoderOutput
from moesaic.moe.config import MoE
from moesaic.moe.router_logits import RouterStateWidths


@dataclass(frozen=True, slots=True)
class BlockRange:
    """The blocks of each stack that a leg passes through."""

    encoder: range
    decoder: range

    @staticmethod
    def all_blocks(config: ModelConfig) -> "BlockRange":
        """Return the leg of all blocks."""
        return BlockRange(range(config.encoder.layers), range(config.decoder.layers))

    @staticmethod
    def between(start: int, stop: int, *, config: ModelConfig) -> "BlockRange":
        """Return the blocks ``start`` to ``stop`` (not included) of the chain."""
        first = config.encoder.layers
        encoder = range(min(start, first), min(stop, first))
        return BlockRange(encoder, range(max(start - first, 0), max(stop - first, 0)))


@dataclass(frozen=True, slots=True)
class StageIO:
    """What a leg hands to the next, on this rank.

    ``x`` are the states of the stack in progress (None where the next leg enters a stack), with
    what its linked routers carry; ``memory`` are those of the source, once it is read.
    """

    x: Float[Tensor, "T D"] | None = None
    router_hidden: Float[Tensor, "T P"] | None = None
    router_logits: Float[Tensor, "T E"] | None = None
    encoder_states: Float[Tensor, "S D"] | None = None


def router_state_widths(config: ModelConfig, stack: Stack) -> RouterStateWidths:
    """Return how wide what the routers of a stack hand on is."""
    moe = config.moe_of_stack(stack)
    if not isinstance(moe, MoE) or not stack.moe_layers:
        return RouterStateWidths()
    first = config.routed_moe_of_layer(stack, layer=stack.moe_layers[0]) or moe
    return moe.cross_layer.state_widths(experts=first.num_router_outputs)


@dataclass(frozen=True, slots=True)
class PartialForward:
    """A pass that has come to the end of a leg.

    ``stream`` and ``view`` are those of the stack it is in, None between the two; ``heard`` are
    the encoder's records.
    """

    state: BlockState | None = None
    context: ForwardContext | None = None
    encoder_output: EncoderOutput | None = None
    encoder_records: Records = ()

    @property
    def records(self) -> Records:
        """The routing records of the leg."""
        return self.encoder_records + (self.state.records if self.state else ())

    @property
    def stage_output(self) -> StageIO:
        """What the next leg needs of this one."""
        memory = self.encoder_output.states if self.encoder_output else None
        if self.state is None:
            return StageIO(encoder_states=memory)
        carry = self.state.router_state
        return StageIO(self.state.x, carry.hidden, carry.logits, memory)
