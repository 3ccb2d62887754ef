"""Router gate: the linear layer from hidden states to router logits, and its inputs.

``RouterInput`` selects the vectors that the gate reads, ``CrossLayerRouting`` how the routers of a
stack depend on each other (members in ``cross_layer_router.py``).

Letters: T tokens, D model dim, C what a gate reads, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Tensor
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.initializer import normal_parameter, router_std
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.nn.sequence_mixer import MixerContext


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """Position of an MoE layer in its stack: ``index`` of ``count``, and its ``name``."""

    name: str
    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class RouterShape:
    """Sizes of a router: the dim of what it reads, its number of outputs, and its position.

    ``causal`` is true in a decoder.
    """

    dim: int
    experts: int
    layer_index: LayerIndex = LayerIndex("")
    causal: bool = False


@dataclass(frozen=True, slots=True)
class GateOutput:
    """Router logits, float32, and the router state for the next MoE layer."""

    logits: Float[Tensor, "T E"]
    router_state: RouterState


class LinearGate(nn.Module):
    """A linear map from the router input to logits."""

    def __init__(self, *, dim: int, experts: int, bias: bool) -> None:
        super().__init__()
        self.weight = normal_parameter(experts, dim, std=router_std(dim))
        self.bias = nn.Parameter(torch.zeros(experts)) if bias else None

    def forward(self, x: Float[Tensor, "T D"], *, router_state: RouterState) -> GateOutput:
        logits = x @ self.weight.float().t()
        logits = logits if self.bias is None else logits + self.bias.float()
        return GateOutput(logits, router_state)


@dataclass(frozen=True, slots=True)
class StackInput:
    """The tokens that enter a stack, for routers that mix them.

    ``decode_state`` comes from ``SharedRouter.init_state``; None for whole rows.
    """

    mixing: MixerContext
    decode_state: DecodeState | None = None


@dataclass(frozen=True, slots=True)
class RouterStateWidths:
    """Values per token in the ``RouterState`` between two layers; 0 where there is none."""

    hidden: int = 0
    logits: int = 0


class SharedRouter(nn.Module):
    """Base of the router modules that all MoE layers of a stack share."""

    def initial_state(self, x: Float[Tensor, "T D"], *, stack_input: StackInput) -> RouterState:
        """Return the router state of the first MoE layer; ``x`` is the input of the stack."""
        raise NotImplementedError

    def init_state(self, _rows: int, /) -> DecodeState | None:
        """Return the decode state of so many rows, if the router reads earlier tokens."""
        return None


class CrossLayerRouting(Choice):
    """Family: router coupling across layers. Each member builds the gate of a layer.

    ``shared_every_layer`` is true if every layer calls the shared module, false if only the entry
    of the stack does.
    """

    shared_every_layer: ClassVar[bool] = False

    def build_gate(self, shape: RouterShape, /) -> nn.Module:
        """Return a module of ``forward(x, *, router_state) -> GateOutput``."""
        raise NotImplementedError

    def gate_parameter_specs(self, _shape: RouterShape, /) -> Sequence[ParameterSpec]:
        """Return the parameters of such a gate; none by default."""
        return ()

    def build_shared(self, _shape: RouterShape, /) -> SharedRouter | None:
        """Return the module that the MoE layers of a stack share, if any."""
        return None

    def shared_parameter_specs(self, _shape: RouterShape, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the shared module; none by default."""
        return ()

    def state_widths(self, _shape: RouterShape, /) -> RouterStateWidths:
        """Return the widths of the router state, which a pipeline stage sends to the next."""
        return RouterStateWidths()

    def problems(self, _experts: Sequence[int], _router_input: "RouterInput", /) -> str | None:
        """Return what it expects of a stack with these numbers of experts per layer, or None."""
        return None


class IndependentRouters(CrossLayerRouting):
    """Each MoE layer routes by its own linear gate, with a learned ``bias`` in GPT-OSS."""

    bias: bool = False

    def build_gate(self, shape: RouterShape, /) -> nn.Module:
        return LinearGate(dim=shape.dim, experts=shape.experts, bias=self.bias)

    def gate_parameter_specs(self, shape: RouterShape, /) -> Sequence[ParameterSpec]:
        bias = (ParameterSpec("bias", (shape.experts,)),) if self.bias else ()
        return (ParameterSpec("router", (shape.experts, shape.dim)), *bias)


EmbeddingSource = Literal["nothing", "token", "tag"]


class RouterInput(Choice):
    """Family: the vectors that a router reads: the hidden state, an input embedding, or both.

    ``embedding_source`` names the embedding that the model puts into the ``TokenContext``: the
    token's own, or that of its row's tag.
    """

    embedding_source: ClassVar[EmbeddingSource] = "nothing"
    with_hidden_state: ClassVar[bool] = True

    def input_dim(self, dim: int) -> int:
        """Return C for a model dim."""
        return (self.with_hidden_state + (self.embedding_source != "nothing")) * dim

    def build(self) -> nn.Module:
        """Return a module of ``forward(x, *, context) -> [T, C]``, float32."""
        return ConcatenatedInput(self.embedding_source, with_hidden_state=self.with_hidden_state)


class HiddenState(RouterInput):
    """The hidden state alone."""


class HiddenStateAndTag(RouterInput):
    """Logits ``W x + U p``, p the input embedding of the row's first token (its language tag).

    Task-prompt-guided routing as in JiuZhang 2.0 (2306.11027), with the tag as the prompt; the sum
    is our reading. The rows of an encoder also begin with the tag of the target language.
    """

    embedding_source: ClassVar[EmbeddingSource] = "tag"


class TagOnly(RouterInput):
    """Logits ``U p``: all tokens of a row get the same experts.

    Task-level routing (2110.03742) by target language: translating into one language needs only
    the experts of its tag.
    """

    embedding_source: ClassVar[EmbeddingSource] = "tag"
    with_hidden_state: ClassVar[bool] = False


class HiddenStateAndToken(RouterInput):
    """Logits ``W x + U e``, e the token's input embedding without its position."""

    embedding_source: ClassVar[EmbeddingSource] = "token"


class TokenOnly(RouterInput):
    """Logits ``U e``: a vocabulary item gets the same experts in every context.

    OpenMoE (2402.01739) finds trained routers close to this (context-independent specialisation);
    as a baseline it measures how much context a router uses.
    """

    embedding_source: ClassVar[EmbeddingSource] = "token"
    with_hidden_state: ClassVar[bool] = False


class ConcatenatedInput(nn.Module):
    """Concatenates the hidden state and the named embedding, or returns one of them."""

    def __init__(self, embedding_source: EmbeddingSource, *, with_hidden_state: bool) -> None:
        super().__init__()
        self.embedding_source, self.with_hidden_state = embedding_source, with_hidden_state

    def forward(self, x: Float[Tensor, "T D"], *, context: TokenContext) -> Float[Tensor, "T C"]:
        if self.embedding_source == "nothing":
            return x
        tag = self.embedding_source == "tag"
        given = context.tag_embedding if tag else context.token_embedding
        if given is None:
            raise TypeError(f"the context has no {self.embedding_source} embedding")
        return torch.cat([x, given.float()], -1) if self.with_hidden_state else given.float()
