"""Activation checkpointing: what frees its activations and recomputes them in backward.

Blocks, branches of blocks, or the cheap operations of blocks: what is checkpointed keeps its inputs
only (Chen et al. 2016, 1604.06174). Losses are those of the first forward pass and count once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

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
# names of overloads: "aten::mm.out" writes to a tensor of the caller and is another one
_PRODUCTS = frozenset(
    {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm"}
)
_ATTENTION = frozenset(
    f"aten::_scaled_dot_product_{kernel}"
    for kernel in (
        "cudnn_attention",
        "efficient_attention",
        "flash_attention",
        "flash_attention_for_cpu",
        "fused_attention_overrideable",
    )
)
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
        model.run_block = CheckpointedForward(blocks, contexts=_kept_products)


def _kept_products() -> _Contexts:
    results: deque[_KeptResult] = deque()
    return _KeepProducts(results), _ReuseProducts(results)


@dataclass(slots=True)
class _KeptResult:
    """The result of a call: its leaves, detached, and their versions; ``intact`` until written."""

    operation: Any
    leaves: list[Any]
    structure: TreeSpec
    versions: list[int]
    intact: bool = True


def _is_kept(operation: Any, inputs: Sequence[Any]) -> bool:
    """Whether a result may stand for a second call: functional, and of its inputs alone."""
    name = operation.name()
    if name in _PRODUCTS:
        return True
    if name not in _ATTENTION:
        return False
    # dropout has to draw its numbers again: those of later operations follow them
    names = [argument.name for argument in operation._schema.arguments]
    place = names.index("dropout_p")
    return place >= len(inputs) or inputs[place] == 0.0


class _KeepProducts(TorchDispatchMode):
    """Within it, the results of products and attention are noted."""

    def __init__(self, results: deque[_KeptResult]) -> None:
        super().__init__()
        self._results = results
        self._of_storage: dict[int, _KeptResult] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for written in _written(func, args, kwargs):
            if (noted := self._of_storage.get(_storage(written))) is not None:
                noted.intact = False
        if _is_kept(func, args):
            leaves, structure = tree_flatten(result)
            # detached: autograd gives the result itself a graph, which would hold this note
            held = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
            noted = _KeptResult(func, held, structure, _versions(held))
            self._results.append(noted)
            self._of_storage |= {_storage(x): noted for x in held if isinstance(x, torch.Tensor)}
        return result


class _ReuseProducts(TorchDispatchMode):
    """Within it, results noted are returned, each once; all else is computed.

    Only those operations are counted: hooks (gathers of ZeRO, statistics) may call others in one
    pass alone. A result that was changed in place is computed again.
    """

    def __init__(self, results: deque[_KeptResult]) -> None:
        super().__init__()
        self._results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._results and _is_kept(func, args):
            noted = self._results.popleft()
            if noted.operation is not func:
                raise RuntimeError(
                    f"recomputation calls {func} where forward called {noted.operation}"
                )
            if noted.intact and _versions(noted.leaves) == noted.versions:
                return tree_unflatten(noted.leaves, noted.structure)
        return func(*args, **(kwargs or {}))


def _written(operation: Any, inputs: Sequence[Any], options: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that a call changes. Versions miss some: ``unsafe_chunk`` has its own."""
    if not isinstance(operation, OpOverload) or not operation._schema.is_mutable:
        return
    given = (
        dict(zip((each.name for each in operation._schema.arguments), inputs, strict=False))
        | options
    )
    for argument in operation._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed = tree_leaves(given.get(argument.name))
            yield from (x for x in changed if isinstance(x, torch.Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _versions(leaves: Sequence[Any]) -> list[int]:
    return [x._version if isinstance(x, torch.Tensor) else 0 for x in leaves]


def _recompute_all() -> _Contexts:
    return nullcontext(), nullcontext()


class CheckpointedForward:
    """Runs a block of a model, with activation checkpointing if it is one of ``blocks``.

    Both forward passes compute the same: random numbers are replayed, routers have the statistics
    of the first pass, and every collective is called in the same order.
    """

    def __init__(
        self, blocks: set[nn.Module], *, contexts: Callable[[], _Contexts] = _recompute_all
    ) -> None:
        self._blocks, self._contexts = blocks, contexts

    def __call__(
        self, block: EncoderBlock | DecoderBlock, state: BlockState, **parts: Any
    ) -> BlockState:
        if block not in self._blocks:
            return run_block(block, state, **parts)
        return _run_checkpointed(block, block, state, contexts=self._contexts, **parts)


def _run_checkpointed(
    module: nn.Module,
    forward: Callable[..., Any],
    *inputs: Any,
    contexts: Callable[[], _Contexts] = _recompute_all,
    **parts: Any,
) -> Any:
    """Return ``forward(*inputs, **parts)``, which computes ``module``; recomputed in backward."""
    if not torch.is_grad_enabled():
        return forward(*inputs, **parts)

    def of_both_passes() -> _Contexts:
        first, second = contexts()
        return first, _RecomputedPass([layer.router for layer in moe_layers(module)], second)

    # stopping early would skip the collectives after the last tensor that backward needs
    with set_checkpoint_early_stop(False):
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=of_both_passes, **parts)


class _RecomputedPass:
    """Within it, and ``inner``, routers have the statistics that they had when it was made.

    Schedules that split the backward pass recompute twice, so it can be entered again.
    """

    def __init__(self, routers: Sequence[Router], inner: AbstractContextManager[Any]) -> None:
        self._inner = inner
        self._saved = [(router, router.stats_sum.clone()) for router in routers]
        self._current: list[Tensor] = []

    def __enter__(self) -> None:
        self._current = [router.stats_sum.clone() for router, _ in self._saved]
        for router, saved in self._saved:
            router.stats_sum.copy_(saved)
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        for (router, _), current in zip(self._saved, self._current, strict=True):
            router.stats_sum.copy_(current)
        self._current = []
