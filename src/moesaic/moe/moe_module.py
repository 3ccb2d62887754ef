"""MoE module: one MoE layer as a plain ``torch.nn.Module``, for any model and training loop.

``moesaic.MoE`` is ``MoEModule``. It is the layer that the trainer trains (``layer.py``) with what
the trainer does around it: initial weights, the tokens' context, and the statistics of rules with a
state.

Letters: T real tokens, B rows, D model dim.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.moe import builtin_rules as builtin_rules  # registers every rule that text may name
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import Hash, Select, SigmoidTopK, SwitchTop1, TopK
from moesaic.moe.expert_selection_dynamic import ExpertChoice
from moesaic.moe.initial_weights import default_std, draw_whole, initial_distributions
from moesaic.moe.layer import MoELayer
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import IndependentRouters, LayerIndex
from moesaic.moe.routing_record import RoutingRecord
from moesaic.nn.feed_forward import Activation, FeedForwardConfig, SwiGLU
from moesaic.nn.initializer import allocate_whole, draw_seed, parameters_on_meta

_TOP_K = re.compile(r"(sigmoid-)?top(\d+)")


class MoEModule(nn.Module):
    """One MoE layer as a plain module: hidden states [..., D] in, hidden states of that shape out.

    ``router`` is ``top1``, ``top2``, ``topK`` for any K, ``sigmoid-topK``, ``expert-choice`` (not
    causal), or a ``Select`` rule of your own. ``rules`` are the other fields of
    ``moesaic.moe.config.MoE``: ``balance``, ``limit``, ``noise``, ``shared_experts``, ...

    After a forward pass in training mode ``aux_loss`` is the sum of the layer's auxiliary losses;
    add it to yours. After an optimizer step call ``update_rules``, without which rules that have a
    state (``BiasUpdate``, ``AdaptiveBalance``) keep their initial one. ``moesaic.aux_loss(model)``
    and ``moesaic.update_rules(model)`` do so for every layer of a model.

    Raises ConfigError for rules that do not fit, or that need more than one layer.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        router: str | Select = "top2",
        *,
        activation: Activation | None = None,
        bias: bool = False,
        **rules: Any,
    ) -> None:
        super().__init__()
        self.config = MoE(experts=experts, select=_select_rule(router), **rules)
        _check_config(self.config, dim=dim, hidden=hidden)
        feed_forward = FeedForwardConfig(hidden=hidden, activation=activation or SwiGLU())
        with parameters_on_meta():
            self.layer = MoELayer(
                self.config,
                dim=dim,
                feed_forward=feed_forward,
                bias=bias,
                layer_index=LayerIndex("layer"),
            )
        allocate_whole(self)
        self.dim = dim
        self._losses: dict[str, Tensor] = {}
        # of the last forward pass, which its backward pass may repeat
        self._pending_stats = torch.zeros_like(self.layer.router.stats_sum)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights, with a seed of torch's global generator, as a model does."""
        distributions = initial_distributions(
            self,
            std_of=lambda _name, kind, shape, initializer: default_std(
                kind, shape=shape, initializer=initializer
            ),
        )
        draw_whole(self, distributions, seed=draw_seed())

    def forward(
        self,
        x: Float[Tensor, "*B D"],
        *,
        mask: Bool[Tensor, "*B"] | None = None,
        token_ids: Int[Tensor, "*B"] | None = None,
        context: TokenContext | None = None,
        return_losses: bool = False,
    ) -> Any:
        """Return the output [..., D], and with ``return_losses`` also the losses by name.

        ``mask`` is true for real tokens: the others are not routed, and their output is zero. The
        last dim but one of ``x`` are the positions of a row. ``token_ids`` are for ``Hash``.
        ``context`` describes the real tokens instead (row keys, embeddings), as in the trainer.
        """
        _check_shapes(x, dim=self.dim, mask=mask)
        tokens = x.reshape(-1, self.dim)
        kept = None if mask is None else mask.reshape(-1).nonzero()[:, 0]
        if context is None:
            context = self._token_context(x, token_ids=token_ids)
            context = context if kept is None else _select_tokens(context, kept)
        routed, record = self._route(
            tokens if kept is None else tokens.index_select(0, kept), context
        )
        if kept is not None:
            routed = routed.new_zeros(tokens.shape).index_copy(0, kept, routed)
        out = routed.reshape(x.shape)
        return (out, dict(record.losses)) if return_losses else out

    @property
    def aux_loss(self) -> Float[Tensor, ""]:
        """The sum of the auxiliary losses of the last forward pass; zero in evaluation mode.

        Raises RuntimeError if that pass recorded no graph, so that the loss would train nothing.
        """
        trained = next(self.layer.router.gate.parameters())
        total = sum(self._losses.values(), start=trained.new_zeros((), dtype=torch.float32))
        wanted = bool(self._losses) and torch.is_grad_enabled() and trained.requires_grad
        if wanted and not total.requires_grad:
            raise RuntimeError(
                "aux_loss has no graph: the last forward pass ran without gradients, as in "
                "torch.utils.checkpoint(use_reentrant=True). Use use_reentrant=False, or "
                "return the losses from the checkpointed function (return_losses=True)"
            )
        return total

    @torch.no_grad()
    def update_rules(self) -> None:
        """Update the rules that have a state, after an optimizer step, from all tokens since then.

        Under torch.distributed a collective: tokens of all ranks count, so all ranks get the same
        state.
        """
        self._count_pending()
        stats = self.layer.router.stats_sum
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(stats)
        self.layer.router.update_rules()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, experts={self.config.experts}, router={self.config.select}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the losses of the last forward pass: their graph cannot be copied."""
        return self.__dict__ | {"_losses": {}}

    @torch.no_grad()
    def _count_pending(self) -> None:
        """Add the statistics of the last forward pass, whose backward pass is over by now."""
        self.layer.router.accumulate_stats(self._pending_stats)
        self._pending_stats = torch.zeros_like(self._pending_stats)

    def _route(
        self, tokens: Float[Tensor, "T D"], context: TokenContext
    ) -> tuple[Float[Tensor, "T D"], RoutingRecord]:
        repeated = _is_repeated_pass()
        if self.training and not repeated:
            self._count_pending()
        output = self.layer(tokens, context=context, router_state=RouterState())
        record = output.record
        if not repeated:
            self._losses = dict(record.losses)
        if record.stats_vector is not None and not repeated:
            self._pending_stats = record.stats_vector
        return output.out, record

    def _token_context(
        self, x: Float[Tensor, "*B D"], *, token_ids: Int[Tensor, "*B"] | None
    ) -> TokenContext:
        """Return the context of all tokens; in training the row keys are new random numbers."""
        if token_ids is None and isinstance(self.config.select, Hash):
            raise TypeError("Hash routes by vocabulary ids: give token_ids, one for each token")
        length = x.shape[-2] if x.ndim > 1 else 1
        rows = x.numel() // (self.dim * length) if length else 0
        index = torch.arange(rows * length, device=x.device)
        row, position = index // max(length, 1), index % max(length, 1)
        key = torch.arange(rows, device=x.device)
        if self.training:
            key = torch.randint(-(2**62), 2**62, (rows,), device=x.device)
        token = torch.zeros_like(row) if token_ids is None else token_ids.reshape(-1)
        return TokenContext(row, position, token, torch.zeros_like(row), key[row], num_rows=rows)


def aux_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Return the sum of ``aux_loss`` over the MoE modules of a model; zero if it has none."""
    return sum((module.aux_loss for module in moe_modules(model)), start=torch.zeros(()))


def update_rules(model: nn.Module) -> None:
    """Update the rules of all MoE modules of a model, after an optimizer step."""
    for module in moe_modules(model):
        module.update_rules()


def moe_modules(model: nn.Module) -> Iterator[MoEModule]:
    """Yield the MoE modules of a model."""
    return (module for module in model.modules() if isinstance(module, MoEModule))


def _select_rule(router: str | Select) -> Any:
    """Return the rule of a short name; other text is read as in a config (``TopK(k=2)``)."""
    if not isinstance(router, str):
        return router
    if router == "expert-choice":
        return ExpertChoice()
    found = _TOP_K.fullmatch(router)
    if found is None:
        return router
    k = int(found[2])
    if found[1]:
        return SigmoidTopK(k=k)
    return SwitchTop1() if k == 1 else TopK(k=k)  # normalised, one weight would have no gradient


def _check_config(config: MoE, *, dim: int, hidden: int) -> None:
    sizes = (("dim", dim), ("hidden", hidden))
    problems = [f"{name}={size}: expected at least 1" for name, size in sizes if size < 1]
    nulls = config.null_experts.count()
    if expected := config.select.problems(config.num_router_outputs, nulls):
        problems.append(f"{type(config.select).__name__} expects {expected}")
    if not isinstance(config.cross_layer, IndependentRouters):
        name = type(config.cross_layer).__name__
        problems.append(f"cross_layer={name} couples the layers of a stack, and this is one layer")
    if problems:
        raise ConfigError(problems)


def _check_shapes(x: Tensor, *, dim: int, mask: Tensor | None) -> None:
    if not x.ndim or x.shape[-1] != dim:
        raise ValueError(f"x has the shape {list(x.shape)}, expected [..., {dim}]")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has the dtype {mask.dtype}, expected bool: true for real tokens")
    if mask.shape != x.shape[:-1]:
        found, expected = list(mask.shape), list(x.shape[:-1])
        raise ValueError(f"mask has the shape {found}, expected that of the tokens, {expected}")


def _select_tokens(context: TokenContext, kept: Int[Tensor, "T"]) -> TokenContext:
    return TokenContext(
        context.row[kept],
        context.position[kept],
        context.token[kept],
        context.tag[kept],
        context.row_key[kept],
        num_rows=context.num_rows,
    )


def _is_repeated_pass() -> bool:
    """Whether activation checkpointing repeats a forward pass, within a backward pass."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint itself asks
