"""Gates: what turns a token's state into logits, and what the layers of a stack tell each other.

``RouterInput`` changes what the gate reads, ``CrossLayerRouting`` says where logits come from: from this layer
alone, or with the help of others.

Letters: T tokens, D model dim, C what a gate reads, E experts, B rows, n newest tokens.

Gates that read the embedding of a row's tag, or of the token, besides or instead of the state.

Letters: T tokens, D model dim, C what a gate reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.parameter_spec import ParameterSpec
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.nn.attention_backend import KeyValue
from moesaic.nn.packing import Packing


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """Which of a stack's MoE layers this is: ``index`` of ``count``, called ``name``."""

    name: str
    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class GateOutput:
    """A gate's logits, float32, and what the next layer gets."""

    logits: Float[Tensor, "T E"]
    router_state: RouterState


class LinearGate(nn.Module):
    """A bias-free linear map, the gate of nearly every paper."""

    def __init__(self, *, dim: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x: Float[Tensor, "T D"], *, router_state: RouterState) -> GateOutput:
        return GateOutput(x @ self.weight.float().t(), router_state)


@dataclass(frozen=True, slots=True)
class RouterDecodeState:
    """In decoding: where the newest tokens are in their rows, and what is kept of those before.

    ``kept`` is what shared routing asked for (``SharedRouter.memory``), with room for the newest.
    """

    position: Int[Tensor, "B n"]
    cache: KeyValue | None


@dataclass(frozen=True, slots=True)
class StackInput:
    """Where the tokens that enter a stack are; ``past`` is None where whole rows enter at once.

    ``position`` is that of the tokens that meet in a matrix (``packing.met``).
    """

    packing: Packing
    position: Int[Tensor, "T"]
    decode_state: RouterDecodeState | None = None


@dataclass(frozen=True, slots=True)
class RouterStateWidths:
    """Widths of what the layers of a stack hand on of each token (``RouterState``); 0 is nothing."""

    hidden: int = 0
    logits: int = 0


class SharedRouter(nn.Module):
    """Base of what the MoE layers of one stack share."""

    def initial_state(self, x: Float[Tensor, "T D"], *, stack_input: StackInput) -> RouterState:
        """Return what the first MoE layer is handed; ``x`` is what enters the stack."""
        raise NotImplementedError

    def empty_cache(self, rows: int) -> KeyValue | None:
        """Return an empty memory of so many rows for decoding, if tokens look at earlier ones."""
        del rows
        return None


class CrossLayerRouting(Choice):
    """Family: where a layer's logits come from. Each member builds the gate of a layer.

    ``dim`` is that of what the gate reads, or, for what is shared, of the states. ``shared_every_layer`` says
    that what is shared is used again in every layer, not once where the stack is entered.
    """

    shared_every_layer: ClassVar[bool] = False

    def build_gate(self, *, dim: int, experts: int, layer_index: LayerIndex) -> nn.Module:
        """Return a module of ``forward(x, *, carry) -> Scored``."""
        raise NotImplementedError

    def gate_parameter_specs(
        self, *, dim: int, experts: int, layer_index: LayerIndex
    ) -> Sequence[ParameterSpec]:
        """Return the parameters of such a gate."""
        raise NotImplementedError

    def build_shared(self, *, dim: int, experts: int, causal: bool) -> SharedRouter | None:
        """Return what the MoE layers of one stack share, or None."""
        del dim, experts, causal
        return None

    def shared_parameter_specs(self, *, dim: int, experts: int) -> Sequence[ParameterSpec]:
        """Return the parameters of what is shared."""
        del dim, experts
        return ()

    def state_widths(self, *, experts: int) -> RouterStateWidths:
        """Return what its layers hand on, for a stack that is cut between two of them."""
        del experts
        return RouterStateWidths()

    def saved_activations(self, *, dim: int, layer_index: LayerIndex) -> int:
        """Return the values per token that autograd keeps of a gate besides state and logits.

        The state counts as kept (``model/training_memory.py``): ``-dim`` of a gate that does not read it.
        """
        del dim, layer_index
        return 0

    def shared_saved_activations(self) -> int:
        """Return the values per token that autograd keeps of what is shared."""
        return 0

    def problems(self, *, experts: Sequence[int], router_input: "RouterInput") -> str | None:
        """Return what it expects of a stack whose layers have so many experts, if not this."""
        del experts, router_input
        return None


class IndependentRouters(CrossLayerRouting):
    """Each layer decides by itself."""

    def build_gate(self, *, dim: int, experts: int, layer_index: LayerIndex) -> nn.Module:
        del layer_index
        return LinearGate(dim=dim, experts=experts)

    def gate_parameter_specs(
        self, *, dim: int, experts: int, layer_index: LayerIndex
    ) -> Sequence[ParameterSpec]:
        del layer_index
        return (ParameterSpec("router", (experts, dim)),)


EmbeddingSource = Literal["nothing", "token", "prompt"]


class RouterInput(Choice):
    """Family: what the gate knows besides the token's state.

    ``reads`` says which embeddings the model must put into the ``TokenContext``, ``dim`` how wide what
    the gate reads is.
    """

    def embedding_source(self) -> EmbeddingSource:
        """Return what of the context it needs."""
        return "nothing"

    def input_dim(self, dim: int) -> int:
        """Return C for a model dim."""
        return dim

    def build(self, *, dim: int) -> nn.Module:
        """Return a module of ``forward(x, *, context) -> [T, C]``, float32."""
        raise NotImplementedError

    def parameter_specs(self, *, dim: int) -> Sequence[ParameterSpec]:
        """Return its parameters."""
        del dim
        return ()

    def saved_activations(self, dim: int) -> int:
        """Return the values per token that autograd keeps of it, as for ``CrossLayerRouting.kept``."""
        del dim
        return 0

    def shared_saved_activations(self, dim: int) -> int:
        """Return those of a stack, whatever its number of layers."""
        del dim
        return 0


class HiddenState(RouterInput):
    """The state alone."""

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return _HiddenStateInput()


class _HiddenStateInput(nn.Module):
    def forward(self, x: Float[Tensor, "T D"], *, context: TokenContext) -> Float[Tensor, "T D"]:
        del context
        return x


class HiddenStateAndTag(RouterInput):
    """Logits ``W x + U p``, p the input embedding of the row's first token (its language tag).

    Task-prompt-guided routing as in JiuZhang 2.0 (2306.11027), with the tag as the prompt; the sum
    is our reading. Rows of an encoder, too, begin with the tag of the language to be written.
    """

    def embedding_source(self) -> EmbeddingSource:
        return "prompt"

    def input_dim(self, dim: int) -> int:
        return 2 * dim

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=True)

    def saved_activations(self, dim: int) -> int:
        return dim


class TagOnly(RouterInput):
    """Logits ``U p``: all tokens of a row take the same experts.

    Task-level routing (2110.03742) by target language: a translation into one language needs only
    the experts of its tag.
    """

    def embedding_source(self) -> EmbeddingSource:
        return "prompt"

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=False)

    def saved_activations(self, dim: int) -> int:
        return -dim

    def shared_saved_activations(self, dim: int) -> int:
        return dim


class HiddenStateAndToken(RouterInput):
    """Logits ``W x + U e``, e the token's input embedding, without its position."""

    def embedding_source(self) -> EmbeddingSource:
        return "token"

    def input_dim(self, dim: int) -> int:
        return 2 * dim

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=True)

    def saved_activations(self, dim: int) -> int:
        return dim


class TokenOnly(RouterInput):
    """Logits ``U e``: a vocabulary item takes the same experts wherever it stands.

    What OpenMoE (2402.01739) finds trained routers to come close to (context-independent
    specialisation), made exact: a baseline for how much context a router uses.
    """

    def embedding_source(self) -> EmbeddingSource:
        return "token"

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return EmbeddingInput(self.embedding_source(), with_hidden_state=False)

    def saved_activations(self, dim: int) -> int:
        return -dim


class EmbeddingInput(nn.Module):
    """Puts the embedding that ``reads`` names beside the state, or in its place."""

    def __init__(self, embedding_source: EmbeddingSource, *, with_hidden_state: bool) -> None:
        super().__init__()
        self.embedding_source, self.with_hidden_state = embedding_source, with_hidden_state

    def forward(self, x: Float[Tensor, "T D"], *, context: TokenContext) -> Float[Tensor, "T C"]:
        given = (
            context.tag_embedding if self.embedding_source == "prompt" else context.token_embedding
        )
        if given is None:
            raise TypeError(f"the context does not say the {self.embedding_source}'s embedding")
        return torch.cat([x, given.float()], -1) if self.with_hidden_state else given.float()
