"""Recompute: which blocks forget their inner activations and make them again in backward.

A block then keeps what it was given and nothing else (Chen et al. 2016, 1604.06174). Its losses are
those of the first pass: they are counted once.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moesaic.core.config import Choice
from moesaic.core.shapes import Tensor
from moesaic.model.block import BlockState, DecoderBlock, EncoderBlock
from moesaic.model.transformer import Transformer, run_block
from moesaic.moe.layer import moe_layers
from moesaic.moe.router import Router


class ActivationCheckpointing(Choice):
    """Family: what is made again in backward."""

    def applies_to(self, layer: int) -> bool:
        """Whether block ``layer`` of its stack, from 0, is passed through again."""
        raise NotImplementedError


class NoCheckpointing(ActivationCheckpointing):
    """Nothing: all activations are kept."""

    def applies_to(self, layer: int) -> bool:
        del layer
        return False


class CheckpointBlocks(ActivationCheckpointing):
    """Every ``every``-th block of a stack, the first included: 1 is all of them."""

    every: int = Field(default=1, ge=1)

    def applies_to(self, layer: int) -> bool:
        return layer % self.every == 0


def apply_activation_checkpointing(model: Transformer, *, by: ActivationCheckpointing) -> None:
    """Let the blocks of a model be passed through again in backward, where ``by`` says so."""
    found = {
        block
        for stack in (model.encoder, model.decoder)
        for layer, block in enumerate(stack)
        if by.applies_to(layer)
    }
    model.run_block = CheckpointedForward(found) if found else run_block


class CheckpointedForward:
    """How a stream passes through blocks, some of which make their activations again.

    What happens between the two passes changes nothing: random numbers are those of the first, and
    routers know what they knew then. Both passes make every collective, in the same order.
    """

    def __init__(self, blocks: set[nn.Module]) -> None:
        self._blocks = blocks

    def __call__(
        self, block: EncoderBlock | DecoderBlock, stream: BlockState, **parts: Any
    ) -> BlockState:
        if block not in self._blocks:
            return run_block(block, stream, **parts)
        # to stop early would leave out the collectives after the last tensor that is wanted
        with set_checkpoint_early_stop(False):
            return checkpoint(
                block,
                stream,
                use_reentrant=False,
                context_fn=lambda: _checkpoint_contexts(block),
                **parts,
            )


def _checkpoint_contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first pass, which begins now, and of the second."""
    return nullcontext(), _RestoredRouterState([layer.router for layer in moe_layers(block)])


class _RestoredRouterState:
    """Inside, routers have heard what they had when this was made. Entered once per backward."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._then = [(router, router.stats_sum.clone()) for router in routers]
        self._now: list[Tensor] = []

    def __enter__(self) -> None:
        self._now = [router.stats_sum.clone() for router, _ in self._then]
        for router, then in self._then:
            router.stats_sum.copy_(then)

    def __exit__(self, *error: object) -> None:
        for (router, _), now in zip(self._then, self._now, strict=True):
            router.stats_sum.copy_(now)
        self._now = []
