"""Activation checkpointing: blocks whose activations are freed and recomputed in backward.

Such a block keeps its inputs only (Chen et al. 2016, 1604.06174). Losses are those of the first
forward pass and count once.
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
    """Family: which blocks recompute their activations in backward."""

    def select(self, blocks: Sequence[nn.Module]) -> Sequence[nn.Module]:
        """Return the checkpointed blocks of a stack."""
        raise NotImplementedError


class NoActivationCheckpointing(ActivationCheckpointing):
    """No activation checkpointing: all activations are kept."""

    def select(self, blocks: Sequence[nn.Module]) -> Sequence[nn.Module]:
        return blocks[:0]


class CheckpointBlocks(ActivationCheckpointing):
    """Every ``every``-th block of a stack, the first included: 1 is all of them."""

    every: int = Field(default=1, ge=1)

    def select(self, blocks: Sequence[nn.Module]) -> Sequence[nn.Module]:
        return blocks[:: self.every]


def apply_activation_checkpointing(model: Transformer, *, by: ActivationCheckpointing) -> None:
    """Checkpoint the blocks of a model that ``by`` selects."""
    blocks = {*by.select(list(model.encoder)), *by.select(list(model.decoder))}
    model.run_block = CheckpointedForward(blocks) if blocks else run_block


class CheckpointedForward:
    """Runs a block of a model, with activation checkpointing if it is one of ``blocks``.

    Both forward passes compute the same: random numbers are replayed, routers have the statistics
    of the first pass, and every collective is called in the same order.
    """

    def __init__(self, blocks: set[nn.Module]) -> None:
        self._blocks = blocks

    def __call__(
        self, block: EncoderBlock | DecoderBlock, state: BlockState, **parts: Any
    ) -> BlockState:
        if block not in self._blocks:
            return run_block(block, state, **parts)
        # stopping early would skip the collectives after the last tensor that backward needs
        with set_checkpoint_early_stop(False):
            return checkpoint(
                block, state, use_reentrant=False, context_fn=lambda: _contexts(block), **parts
            )


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first pass, which starts now, and of the recomputation."""
    return nullcontext(), _RestoredRouterState([layer.router for layer in moe_layers(block)])


class _RestoredRouterState:
    """Within it, routers have the statistics that they had when it was made. Entered only once."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._saved = [(router, router.stats_sum.clone()) for router in routers]
        self._current: list[Tensor] = []

    def __enter__(self) -> None:
        self._current = [router.stats_sum.clone() for router, _ in self._saved]
        for router, saved in self._saved:
            router.stats_sum.copy_(saved)

    def __exit__(self, *error: object) -> None:
        for (router, _), current in zip(self._saved, self._current, strict=True):
            router.stats_sum.copy_(current)
        self._current = []
