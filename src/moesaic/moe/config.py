"""MoE config: the sparse layers of a model, and the experts and routing rules of an MoE layer."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.moe.auxiliary_losses import Balance, SwitchBalance
from moesaic.moe.dispatch_projection import DispatchProjection, NoDispatchProjection
from moesaic.moe.expert_capacity import Dropless, Limit
from moesaic.moe.expert_selection import Select, SwitchTop1, TopK
from moesaic.moe.experts import Expert, FeedForwardExpert
from moesaic.moe.null_experts import NoNullExperts, NullExperts
from moesaic.moe.router_context import StatefulRule
from moesaic.moe.router_gate import (
    CrossLayerRouting,
    HiddenState,
    IndependentRouters,
    RouterInput,
)
from moesaic.moe.router_noise import NoRouterNoise, RouterNoise
from moesaic.moe.shared_experts import NoSharedExperts, SharedExpertBranch, SharedExperts
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.parameter_spec import FeedForwardShape, ParameterSpec


class SparseLayer(Choice):
    """Family: the layer that replaces every k-th feed-forward.

    ``NoMoE`` keeps the dense one, ``MoE`` is a ``layer.MoELayer``; other members build and count a
    layer of their own. ``count_label`` names its parameters in counts.
    """

    count_label: ClassVar[str] = "experts"

    def build(self, shape: FeedForwardShape, /) -> nn.Module:
        """Return a module of ``forward(x, *, context, router_state) -> layer.MoEOutput``."""
        raise NotImplementedError

    def parameter_specs(self, shape: FeedForwardShape, /) -> Sequence[ParameterSpec]:
        """Return its parameters, given the shape of the dense feed-forward."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        """Whether a token's output does not depend on later tokens."""
        return True

    @property
    def needs_whole_rows(self) -> bool:
        """Whether a token's output needs the other tokens of its row on the same rank."""
        return False


class NoMoE(SparseLayer):
    """No sparse layer: every feed-forward is dense."""


class MoE(SparseLayer):
    """An MoE layer of ``experts`` feed-forwards; ``hidden`` defaults to the dense width.

    ``weights_on``: the weights of selected experts multiply their outputs, or their inputs (Llama
    4, where the weight thus acts before the activation).
    """

    experts: int = Field(ge=1)
    hidden: int | None = Field(default=None, ge=1)
    select: Select = SwitchTop1()
    limit: Limit = Dropless()
    weights_on: Literal["outputs", "inputs"] = "outputs"
    balance: tuple[Balance, ...] = (SwitchBalance(),)
    noise: RouterNoise = NoRouterNoise()
    expert: Expert = FeedForwardExpert()
    shared_experts: SharedExpertBranch = NoSharedExperts()
    null_experts: NullExperts = NoNullExperts()
    dispatch_projection: DispatchProjection = NoDispatchProjection()
    router_input: RouterInput = HiddenState()
    cross_layer: CrossLayerRouting = IndependentRouters()

    @property
    def causal(self) -> bool:
        return self.select.causal

    @property
    def needs_whole_rows(self) -> bool:
        return self.select.needs_whole_rows or self.limit.needs_whole_rows

    @property
    def num_router_outputs(self) -> int:
        """The experts that the router selects from, null experts included."""
        return self.experts + self.null_experts.count()

    def feed_forward(self, dense: FeedForwardConfig) -> FeedForwardConfig:
        """Return the feed-forward of one expert, given the dense one of the model."""
        return dense if self.hidden is None else dense.replace(hidden=self.hidden)

    def stateful_rules(self) -> Iterator[tuple[str, StatefulRule]]:
        """Yield the rules that may have a state, by name."""
        yield "select", self.select
        yield "noise", self.noise
        for number, term in enumerate(self.balance):
            yield f"balance{number}", term

    @model_validator(mode="after")
    def _check(self) -> "MoE":
        for term in self.balance:
            if expected := term.problems(self.experts, self.limit):
                raise ValueError(f"{type(term).__name__} expects {expected}")
            if term.needs_fixed_k and self.select.variable_k:
                name, rule = type(term).__name__, type(self.select).__name__
                raise ValueError(f"{name} expects a fixed number of experts per token, not {rule}")
        return self


def fine_grained(moe: MoE, *, hidden: int, splits: int, shared: int = 0) -> MoE:
    """Split each of N experts of width ``hidden`` into ``splits``, and make ``shared`` shared.

    Fine-grained experts of DeepSeekMoE (2401.06066, sections 3.1 and 3.2): of splits * N experts of
    width hidden / splits a token uses splits * K, shared experts included, weighted with softmax
    probabilities. The total and active parameters of the experts stay the same; the router grows.

    Raises ConfigError if the width does not divide or no routed expert is left.
    """
    chosen = round(moe.select.experts_per_token(moe.experts))
    if hidden % splits:
        raise ConfigError([f"hidden={hidden}: expected a multiple of splits={splits}"])
    if not 0 <= shared < splits * chosen:
        left = f"fewer than the {splits * chosen} experts that a token uses"
        raise ConfigError([f"shared={shared}: expected 0 or more, and {left}"])
    return moe.replace(
        experts=splits * moe.experts - shared,
        hidden=hidden // splits,
        select=TopK(k=splits * chosen - shared, normalise="none"),
        shared_experts=SharedExperts(number=shared) if shared else NoSharedExperts(),
    )
