"""Experts: grouped feed-forwards, and LoRA experts over a shared feed-forward.

The weights of all experts of a layer are stacked and applied to rows sorted by expert.

Letters: E experts, R rows, T tokens, D model dim, F hidden width (2F before a gated activation),
r rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.compiled_experts import is_compilable, run_compiled_experts
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.fused_projections import FusedProjections, gate_and_value
from moesaic.nn.initializer import (
    CustomInitializers,
    Initializer,
    fan_in_std,
    normal_parameter,
)
from moesaic.nn.parameter_spec import FeedForwardShape, ParameterSpec
from moesaic.ops.autocast import as_autocast
from moesaic.ops.grouped_gemm import (
    ActivationFunction,
    FeedForwardWeights,
    grouped_feed_forward,
    low_rank_product,
    zero_rows_past_groups,
)
from moesaic.ops.kernel_selection import select_grouped_gemm, select_moe_kernel
from moesaic.ops.moe_kernel import Edges, permute_tokens, unpermute_tokens
from moesaic.ops.permute import RowGroups


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Number of experts, their feed-forward, and the dim of the rows they read and write."""

    num_experts: int
    dim: int
    feed_forward: FeedForwardConfig
    bias: bool

    @property
    def dense(self) -> FeedForwardShape:
        """The shape of one expert."""
        return FeedForwardShape(self.dim, self.feed_forward, self.bias)


class Expert(Choice):
    """Family of expert types. A member builds all experts of a layer at once."""

    def build(self, size: ExpertShape) -> "ExpertModule":
        """Return the experts of a layer."""
        raise NotImplementedError

    def parameter_specs(
        self, size: ExpertShape, *, active_fraction: float
    ) -> Sequence[ParameterSpec]:
        """Return their parameters, of which a token uses ``active_fraction``."""
        raise NotImplementedError


class ExpertModule(nn.Module):
    """Base of the modules with the experts of a layer (see ``dispatcher.ExpertCompute``).

    Members call ``before_use`` with the rows of each expert before they read expert weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._users: list[Callable[[Tensor], None]] = []

    def call_before_use(self, user: Callable[[Tensor], None]) -> None:
        """Have ``user`` get the rows of each expert before each use of expert weights."""
        self._users.append(user)

    def before_use(self, rows_per_expert: Int[Tensor, "E"]) -> None:
        """Tell of the rows of each expert."""
        for user in self._users:
            user(rows_per_expert)

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        """Apply each row's expert; rows past the groups become zero."""
        raise NotImplementedError

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of expert outputs.

        By definition ``unpermute_tokens(self(permute_tokens(x)))``; fused where a kernel can.
        """
        return _run_unfused(x, edges=edges, experts=self.forward)

    def in_one_call(
        self, x: Float[Tensor, "T D"], *, function: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        """Return ``function(x, experts)``; calls of ``experts`` run no hooks of this module."""
        return function(x, _WithoutHooks(self))


def _run_unfused(
    x: Float[Tensor, "T D"], *, edges: Edges, experts: Callable[..., Tensor]
) -> Float[Tensor, "T D"]:
    rows = permute_tokens(x, edges=edges)
    return unpermute_tokens(experts(rows, groups=edges.groups), edges=edges)


class DirectExperts:
    """Experts whose calls run no module hooks."""

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        """Apply each row's expert; rows past the groups become zero."""
        raise NotImplementedError

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        """Return each token's weighted sum of expert outputs, unfused."""
        return _run_unfused(x, edges=edges, experts=self)

    def in_one_call(
        self, x: Float[Tensor, "T D"], *, function: Callable[[Tensor, Any], Tensor]
    ) -> Float[Tensor, "T D"]:
        """Return ``function(x, self)``."""
        return function(x, self)


class _WithoutHooks(DirectExperts):
    """The methods of an expert module's class, without the hooks of the instance."""

    def __init__(self, module: ExpertModule) -> None:
        self._module = module

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        return type(self._module).forward(self._module, rows, groups=groups)

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        return type(self._module).forward_edges(self._module, x, edges=edges)


class FeedForwardExpert(Expert):
    """A feed-forward per expert: up projection, activation, down projection."""

    def build(self, size: ExpertShape) -> "GroupedExperts":
        return GroupedExperts(size)

    def parameter_specs(
        self, size: ExpertShape, *, active_fraction: float
    ) -> Sequence[ParameterSpec]:
        kinds = {"matrix": "expert", "bias": "bias"}
        return [
            ParameterSpec(
                kinds[one.kind], (size.num_experts, *reversed(one.shape)), active_fraction
            )
            for one in size.dense.parameter_specs()
        ]


class GroupedExperts(ExpertModule, FusedProjections):
    """``up`` [E, D, F] and ``down`` [E, F, D]: rows are multiplied from the left."""

    def __init__(self, size: ExpertShape) -> None:
        super().__init__()
        experts, feed, width = size.num_experts, size.feed_forward, size.dense.width
        self.up = normal_parameter(experts, size.dim, width, std=fan_in_std(size.dim))
        self.down = normal_parameter(experts, feed.hidden, size.dim, std=fan_in_std(feed.hidden))
        if size.bias:
            self.up_bias = nn.Parameter(torch.zeros(experts, width))
            self.down_bias = nn.Parameter(torch.zeros(experts, size.dim))
        self.activation, self.bias = feed.activation, size.bias
        self.adapter: ExpertAdapter | None = None

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        self.before_use(groups.rows_per_expert)
        return self._functional()(rows, groups=groups)

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        self.before_use(edges.groups.rows_per_expert)
        return self._functional().forward_edges(x, edges=edges)

    def _functional(self) -> DirectExperts:
        experts = FunctionalExperts(self.weights, self.activation)
        return experts if self.adapter is None else self.adapter.over(experts)

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        return {"up": gate_and_value(self.up.shape[2], hidden=self.down.shape[1])}

    @property
    def weights(self) -> FeedForwardWeights:
        biases = (self.up_bias, self.down_bias) if self.bias else (None, None)
        return FeedForwardWeights(self.up, self.down, *biases)


class ExpertAdapter(CustomInitializers):
    """Base of what is trained beside the frozen weights of ``GroupedExperts``.

    ``first_expert`` is the number of the first of the experts on this rank.
    """

    first_expert = 0

    def over(self, experts: "FunctionalExperts") -> DirectExperts:
        """Return the experts with what is trained added to them."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class FunctionalExperts(DirectExperts):
    """The computation of ``GroupedExperts`` as a function of given weights."""

    weights: FeedForwardWeights
    activation: ActivationFunction

    def __call__(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        rows = as_autocast(rows)
        return grouped_feed_forward(
            rows,
            weights=self.weights,
            groups=groups,
            activation=self.activation,
            gemm=select_grouped_gemm(rows),
        )

    def forward_edges(self, x: Float[Tensor, "T D"], *, edges: Edges) -> Float[Tensor, "T D"]:
        x = as_autocast(x)
        if torch.compiler.is_compiling() and is_compilable(self.activation):
            name = self.activation.kernel_name
            return run_compiled_experts(x, edges=edges, weights=self.weights, kernel_name=name)
        kernel = select_moe_kernel(x, activation=self.activation)
        return kernel(x, edges=edges, weights=self.weights, activation=self.activation)


class LoRAExpert(Expert):
    """Expert e has weights ``W + alpha / rank * A_e B_e`` in both projections (LoRA, 2106.09685).

    W is one feed-forward for all experts, trained like any other (the optimizer may freeze it).
    Each ``B_e`` starts at zero, so all experts start equal to W. Mixtures of LoRA experts are
    MoLoRA (2309.05444), there with a frozen pretrained W and soft merging. Biases belong to W.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)

    def build(self, size: ExpertShape) -> "LoRAExperts":
        return LoRAExperts(size, rank=self.rank, scale=self.alpha / self.rank)

    def parameter_specs(
        self, size: ExpertShape, *, active_fraction: float
    ) -> Sequence[ParameterSpec]:
        experts, rank, dense = size.num_experts, self.rank, size.dense
        uses = active_fraction * experts
        low = ((size.dim, rank), (rank, dense.width), (dense.hidden, rank), (rank, size.dim))
        return [
            *(replace(one, uses_per_token=uses) for one in dense.parameter_specs()),
            *(ParameterSpec("expert", (experts, *shape), active_fraction) for shape in low),
        ]


class LoRAExperts(ExpertModule, CustomInitializers, FusedProjections):
    """``up_a`` [E, D, r], ``up_b`` [E, r, F], ``down_a`` [E, F, r], ``down_b`` [E, r, D]."""

    def __init__(self, size: ExpertShape, *, rank: int, scale: float) -> None:
        super().__init__()
        experts, feed, width = size.num_experts, size.feed_forward, size.dense.width
        self.base = DenseFeedForward(feed, dim=size.dim, bias=size.bias)
        self.up_a = normal_parameter(experts, size.dim, rank, std=fan_in_std(size.dim))
        self.up_b = normal_parameter(experts, rank, width, std=0.0)
        self.down_a = normal_parameter(experts, feed.hidden, rank, std=fan_in_std(feed.hidden))
        self.down_b = normal_parameter(experts, rank, size.dim, std=0.0)
        self.activation, self.scale = feed.activation, scale

    def initializers(self) -> Mapping[str, Initializer]:
        return {"up_b": Initializer(std=0.0), "down_b": Initializer(std=0.0)}

    def fused_outputs(self) -> Mapping[str, tuple[int, ...]]:
        return {"up_b": gate_and_value(self.up_b.shape[2], hidden=self.down_a.shape[1])}

    def forward(self, rows: Float[Tensor, "R D"], *, groups: RowGroups) -> Float[Tensor, "R D"]:
        self.before_use(groups.rows_per_expert)
        rows = as_autocast(rows)
        product = partial(
            low_rank_product, scale=self.scale, groups=groups, gemm=select_grouped_gemm(rows)
        )
        hidden = self.activation(self.base.up(rows) + product(rows, a=self.up_a, b=self.up_b))
        out = self.base.down(hidden) + product(hidden, a=self.down_a, b=self.down_b)
        return zero_rows_past_groups(out, offsets=groups.offsets)
