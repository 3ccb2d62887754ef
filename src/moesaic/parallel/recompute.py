"""Recompute: which blocks forget their inner activations and make them again in backward.

A block then keeps what it was given and nothing else (Chen et al. 2016, 1604.06174). Its losses are
those of the first pass: they are counted once.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moesaic.core.config import Choice
from moesaic.model.block import DecoderBlock, EncoderBlock, Stream
from moesaic.model.transformer import Transformer, straight
from moesaic.moe.layer import layers


class Recompute(Choice):
    """Family: what is made again in backward."""

    def again(self, layer: int) -> bool:
        """Whether block ``layer`` of its stack, from 0, is passed through again."""
        raise NotImplementedError


class KeepAll(Recompute):
    """Nothing: all activations are kept."""

    def again(self, layer: int) -> bool:
        del layer
        return False


class Blocks(Recompute):
    """Every ``every``-th block of a stack, the first included: 1 is all of them."""

    every: int = Field(default=1, ge=1)

    def again(self, layer: int) -> bool:
        return layer % self.every == 0


def recompute(model: Transformer, *, by: Recompute) -> None:
    """Let the blocks of a model be passed through again in backward, where ``by`` says so."""
    found = {
        block
        for stack in (model.encoder, model.decoder)
        for layer, block in enumerate(stack)
        if by.again(layer)
    }
    model.passing = Again(found) if found else straight


class Again:
    """How a stream passes through blocks, some of which make their activations again.

    What happens between the two passes changes nothing: random numbers are those of the first, and
    routers know what they knew then. Both passes make every collective, in the same order.
    """

    def __init__(self, blocks: set[nn.Module]) -> None:
        self._blocks = blocks

    def __call__(self, block: EncoderBlock | DecoderBlock, stream: Stream, **parts: Any) -> Stream:
        if block not in self._blocks:
            return straight(block, stream, **parts)
        # to stop early would leave out the collectives after the last tensor that is wanted
        with set_checkpoint_early_stop(False):
            return checkpoint(
                block, stream, use_reentrant=False, context_fn=lambda: _both(block), **parts
            )


def _both(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first pass, which begins now, and of the second."""
    heard = [(layer.router, layer.router.heard.clone()) for layer in layers(block)]

    @contextmanager
    def as_before() -> Iterator[None]:
        now = [router.heard.clone() for router, _ in heard]
        for router, then in heard:
            router.heard.copy_(then)
        try:
            yield
        finally:
            for (router, _), value in zip(heard, now, strict=True):
                router.heard.copy_(value)

    return nullcontext(), as_before()
