"""Activation checkpointing: what frees its activations and recomputes them in backward.

Blocks, branches of blocks, or the cheap operations of blocks: what is checkpointed keeps its inputs
only (Chen et al. 2016, 1604.06174). Losses are those of the first forward pass and count once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from moesaic.core.config import Choice
from moesaic.core.shapes import Tensor
from moesaic.model.block import (
    BlockState,
    CrossAttentionBranch,
    DecoderBlock,
    EncoderBlock,
    FeedForwardBranch,
    MixerBranch,
    MoEBranch,
)
from moesaic.model.transformer import Transformer, run_block
from moesaic.moe.layer import moe_layers
from moesaic.moe.router import Router

BRANCHES: dict[str, tuple[type[nn.Module], ...]] = {
    "mixer": (MixerBranch, CrossAttentionBranch),
    "feed_forward": (FeedForwardBranch,),
    "moe": (MoEBranch,),
}
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class ActivationCheckpointing(Choice):
    """Family: which activations are recomputed in backward."""

    @property
    def period(self) -> int:
        """After how many blocks of a stack the choice repeats."""
        return 1

    def apply(self, model: Transformer) -> None:
        """Checkpoint a model in place."""
        raise NotImplementedError


class NoActivationCheckpointing(ActivationCheckpointing):
    """No activation checkpointing: all activations are kept."""

    def apply(self, model: Transformer) -> None:
        model.run_block = run_block


class CheckpointBlocks(ActivationCheckpointing):
    """Every ``every``-th block of a stack, the first included: 1 is all of them."""

    every: int = Field(default=1, ge=1)

    @property
    def period(self) -> int:
        return self.every

    def apply(self, model: Transformer) -> None:
        blocks = [*list(model.encoder)[:: self.every], *list(model.decoder)[:: self.every]]
        model.run_block = CheckpointedForward(set(blocks))


class CheckpointBranches(ActivationCheckpointing):
    """The branches of these kinds in every block, norm and dropout included.

    ``mixer`` is attention or another sequence mixer, ``feed_forward`` a dense feed-forward, ``moe``
    a router with its experts. The inputs of branches are kept.
    """

    branches: tuple[Literal["mixer", "feed_forward", "moe"], ...] = ("moe",)

    def apply(self, model: Transformer) -> None:
        kinds = tuple(kind for name in self.branches for kind in BRANCHES[name])
        for module in model.modules():
            if isinstance(module, kinds):
                # an attribute hides the method: module hooks still run around it
                module.forward = partial(_run_checkpointed, module, module.forward)


class CheckpointCheapOperations(ActivationCheckpointing):
    """All operations of blocks but matrix products and attention, whose results are kept.

    Norms, activations, dropout and permutations are recomputed: they cost little time and save
    large tensors (selective recomputation, 2205.05198). Compiled kernels of experts are recomputed.
    """

    def apply(self, model: Transformer) -> None:
        blocks: set[nn.Module] = {*model.encoder, *model.decoder}
        model.run_block = CheckpointedForward(blocks, keep=_keep_products)


def _keep_products(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    name = operation.name().partition("::")[2].partition(".")[0]
    kept = name in _PRODUCTS or name.startswith("_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class CheckpointedForward:
    """Runs a block of a model, with activation checkpointing if it is one of ``blocks``.

    Both forward passes compute the same: random numbers are replayed, routers have the statistics
    of the first pass, and every collective is called in the same order.
    """

    def __init__(
        self, blocks: set[nn.Module], *, keep: Callable[..., CheckpointPolicy] | None = None
    ) -> None:
        self._blocks, self._keep = blocks, keep

    def __call__(
        self, block: EncoderBlock | DecoderBlock, state: BlockState, **parts: Any
    ) -> BlockState:
        if block not in self._blocks:
            return run_block(block, state, **parts)
        return _run_checkpointed(block, block, state, keep=self._keep, **parts)


def _run_checkpointed(
    module: nn.Module,
    forward: Callable[..., Any],
    *inputs: Any,
    keep: Callable[..., CheckpointPolicy] | None = None,
    **parts: Any,
) -> Any:
    """Return ``forward(*inputs, **parts)``, which computes ``module``; recomputed in backward."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **parts)
    # stopping early would skip the collectives after the last tensor that backward needs
    with set_checkpoint_early_stop(False):
        return checkpoint(
            forward,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: _contexts(module, keep=keep),
            **parts,
        )


def _contexts(module: nn.Module, *, keep: Callable[..., CheckpointPolicy] | None) -> _Contexts:
    """Return the contexts of the first pass, which starts now, and of the recomputation."""
    restored = _RestoredRouterState([layer.router for layer in moe_layers(module)])
    if keep is None:
        return nullcontext(), restored
    first, second = create_selective_checkpoint_contexts(keep)
    return first, _within(second, restored)


@contextmanager
def _within(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


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
