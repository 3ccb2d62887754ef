"""Gates: what turns a token's state into logits, and what the layers of a stack tell each other.

``Condition`` changes what the gate reads, ``Link`` says where logits come from: from this layer
alone, or with the help of others.

Letters: T tokens, D model dim, C what a gate reads, E experts, B rows, n newest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.context import Carry, Context
from moesaic.moe.pieces import Piece
from moesaic.nn.looking import KeyValue
from moesaic.nn.packing import Packing


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a stack's MoE layers this is: ``index`` of ``count``, called ``name``."""

    name: str
    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Scored:
    """A gate's logits, float32, and what the next layer gets."""

    logits: Float[Tensor, "T E"]
    carry: Carry


class LinearGate(nn.Module):
    """A bias-free linear map, the gate of nearly every paper."""

    def __init__(self, *, dim: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x: Float[Tensor, "T D"], *, carry: Carry) -> Scored:
        return Scored(x @ self.weight.float().t(), carry)


@dataclass(frozen=True, slots=True)
class Past:
    """In decoding: where the newest tokens are in their rows, and what is kept of those before.

    ``kept`` is what shared routing asked for (``SharedRouting.memory``), with room for the newest.
    """

    position: Int[Tensor, "B n"]
    kept: KeyValue | None


@dataclass(frozen=True, slots=True)
class Sight:
    """Where the tokens that enter a stack are; ``past`` is None where whole rows enter at once.

    ``position`` is that of the tokens that meet in a matrix (``packing.met``).
    """

    packing: Packing
    position: Int[Tensor, "T"]
    past: Past | None = None


@dataclass(frozen=True, slots=True)
class Handing:
    """Widths of what the layers of a stack hand on of each token (``Carry``); 0 is nothing."""

    hidden: int = 0
    logits: int = 0


class SharedRouting(nn.Module):
    """Base of what the MoE layers of one stack share."""

    def start(self, x: Float[Tensor, "T D"], *, sight: Sight) -> Carry:
        """Return what the first MoE layer is handed; ``x`` is what enters the stack."""
        raise NotImplementedError

    def memory(self, rows: int) -> KeyValue | None:
        """Return an empty memory of so many rows for decoding, if tokens look at earlier ones."""
        del rows
        return None


class Link(Choice):
    """Family: where a layer's logits come from. Each member builds the gate of a layer.

    ``dim`` is that of what the gate reads, or, for what is shared, of the states. ``recurs`` says
    that what is shared is used again in every layer, not once where the stack is entered.
    """

    recurs: ClassVar[bool] = False

    def gate(self, *, dim: int, experts: int, place: Place) -> nn.Module:
        """Return a module of ``forward(x, *, carry) -> Scored``."""
        raise NotImplementedError

    def gate_pieces(self, *, dim: int, experts: int, place: Place) -> Sequence[Piece]:
        """Return the parameters of such a gate."""
        raise NotImplementedError

    def shared(self, *, dim: int, experts: int, causal: bool) -> SharedRouting | None:
        """Return what the MoE layers of one stack share, or None."""
        del dim, experts, causal
        return None

    def shared_pieces(self, *, dim: int, experts: int) -> Sequence[Piece]:
        """Return the parameters of what is shared."""
        del dim, experts
        return ()

    def hands(self, *, experts: int) -> Handing:
        """Return what its layers hand on, for a stack that is cut between two of them."""
        del experts
        return Handing()

    def kept(self, *, dim: int, place: Place) -> int:
        """Return the values per token that autograd keeps of a gate besides state and logits.

        The state counts as kept (``model/footprint.py``): ``-dim`` of a gate that does not read it.
        """
        del dim, place
        return 0

    def shared_kept(self) -> int:
        """Return the values per token that autograd keeps of what is shared."""
        return 0

    def problems(self, *, experts: Sequence[int], condition: "Condition") -> str | None:
        """Return what it expects of a stack whose layers have so many experts, if not this."""
        del experts, condition
        return None


class Unlinked(Link):
    """Each layer decides by itself."""

    def gate(self, *, dim: int, experts: int, place: Place) -> nn.Module:
        del place
        return LinearGate(dim=dim, experts=experts)

    def gate_pieces(self, *, dim: int, experts: int, place: Place) -> Sequence[Piece]:
        del place
        return (Piece("router", (experts, dim)),)


Reads = Literal["nothing", "token", "prompt"]


class Condition(Choice):
    """Family: what the gate knows besides the token's state.

    ``reads`` says which embeddings the model must put into the ``Context``, ``dim`` how wide what
    the gate reads is.
    """

    def reads(self) -> Reads:
        """Return what of the context it needs."""
        return "nothing"

    def dim(self, dim: int) -> int:
        """Return C for a model dim."""
        return dim

    def build(self, *, dim: int) -> nn.Module:
        """Return a module of ``forward(x, *, context) -> [T, C]``, float32."""
        raise NotImplementedError

    def pieces(self, *, dim: int) -> Sequence[Piece]:
        """Return its parameters."""
        del dim
        return ()

    def kept(self, dim: int) -> int:
        """Return the values per token that autograd keeps of it, as for ``Link.kept``."""
        del dim
        return 0

    def shared_kept(self, dim: int) -> int:
        """Return those of a stack, whatever its number of layers."""
        del dim
        return 0


class Unconditioned(Condition):
    """The state alone."""

    def build(self, *, dim: int) -> nn.Module:
        del dim
        return _Pass()


class _Pass(nn.Module):
    def forward(self, x: Float[Tensor, "T D"], *, context: Context) -> Float[Tensor, "T D"]:
        del context
        return x
