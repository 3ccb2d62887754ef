"""Decoupled: one router per stack, which decides for all its layers before the first one runs.

Letters: T tokens, D model dim, W router dim, E experts, B rows, n newest tokens.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.context import Carry
from moesaic.moe.gates import (
    Condition,
    Handing,
    Link,
    Place,
    Scored,
    SharedRouting,
    Sight,
    Unconditioned,
)
from moesaic.moe.pieces import Piece
from moesaic.nn.activation import SwiGLU
from moesaic.nn.attention import AttentionConfig, SelfAttention
from moesaic.nn.feed_forward import DenseFeedForward, FeedForwardConfig
from moesaic.nn.looking import KeyValue
from moesaic.nn.position import Rotary
from moesaic.nn.start import CustomInitializers, Initializer


class Decoupled(Link):
    """Read-ME's decoupled router (2410.19123): a small causal transformer, one set of logits.

    One pre-norm block of ``heads`` attention heads and a SwiGLU feed-forward of twice its ``dim``
    reads what enters the stack (embeddings and positions; the paper's has a table of its own) and
    says which experts a token takes in every MoE layer; the layers have no gates. In the encoder
    it looks both ways. In decoding it keeps keys and values of its own. Norms have no gains. Noise
    and balance act in each layer as ever. All MoE layers of a stack have the same number of
    experts.
    """

    dim: int = Field(default=64, ge=1)
    heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Decoupled":
        if self.dim % (2 * self.heads):
            raise ValueError(f"heads={self.heads} of an even width to divide dim={self.dim}")
        return self

    def gate(self, *, dim: int, experts: int, place: Place) -> nn.Module:
        del dim, experts, place
        return DecidedGate()

    def gate_pieces(self, *, dim: int, experts: int, place: Place) -> Sequence[Piece]:
        del dim, experts, place
        return ()

    def shared(self, *, dim: int, experts: int, causal: bool) -> SharedRouting | None:
        return DecoupledRouter(self, dim=dim, experts=experts, causal=causal)

    def shared_pieces(self, *, dim: int, experts: int) -> Sequence[Piece]:
        shapes = [
            (self.dim, dim),
            (3 * self.dim, self.dim),
            (self.dim, self.dim),
            (4 * self.dim, self.dim),
            (self.dim, 2 * self.dim),
            (experts, self.dim),
        ]
        return [Piece("router", shape) for shape in shapes]

    def hands(self, *, experts: int) -> Handing:
        return Handing(logits=experts)

    def kept(self, *, dim: int, place: Place) -> int:
        del place
        return -dim

    def shared_kept(self) -> int:
        return 20 * self.dim + self.heads + 3

    def problems(self, *, experts: Sequence[int], condition: Condition) -> str | None:
        if not isinstance(condition, Unconditioned):
            return "condition=Unconditioned, since no layer has a gate that could read it"
        return f"one number of experts in a stack, not {experts}" if len(set(experts)) > 1 else None


class DecidedGate(nn.Module):
    """The gate of a layer for which all is decided."""

    def forward(self, x: Float[Tensor, "T C"], *, carry: Carry) -> Scored:
        del x
        if carry.logits is None:
            raise TypeError("a decoupled layer needs the logits of its stack's DecoupledRouter")
        return Scored(carry.logits, carry)


class DecoupledRouter(SharedRouting, CustomInitializers):
    """The transformer of a stack, without autocast."""

    def __init__(self, config: Decoupled, *, dim: int, experts: int, causal: bool) -> None:
        super().__init__()
        width = config.dim
        self.project = nn.Parameter(torch.empty(width, dim))
        self.attention = SelfAttention(AttentionConfig(heads=config.heads), dim=width, bias=False)
        feed = FeedForwardConfig(hidden=2 * width, activation=SwiGLU())
        self.feed_forward = DenseFeedForward(feed, dim=width, bias=False)
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.position = Rotary().build(dim=width, head_dim=width // config.heads)
        self.causal = causal

    def start(self, x: Float[Tensor, "T D"], *, sight: Sight) -> Carry:
        with torch.autocast(x.device.type, enabled=False):
            h = x.to(self.project.dtype) @ self.project.t()
            h = h + self._attend(_norm(h), sight=sight)
            h = h + self.feed_forward(_norm(h))
            return Carry(logits=_norm(h).float() @ self.weight.float().t())

    def memory(self, rows: int) -> KeyValue | None:
        heads, width = self.attention.heads, self.attention.head_dim
        empty = self.project.new_zeros(rows, heads, 0, width)
        return KeyValue(empty, empty)

    def initializers(self) -> Mapping[str, Initializer]:
        inner = {name: p for name, p in self.named_parameters() if name != "weight"}
        return {name: Initializer(std=p.shape[1] ** -0.5) for name, p in inner.items()}

    def _attend(self, h: Float[Tensor, "T W"], *, sight: Sight) -> Float[Tensor, "T W"]:
        rotation, past = self.position.rotation(sight.position), sight.past
        if past is None or past.kept is None:
            return self.attention(h, packing=sight.packing, rotation=rotation, causal=self.causal)
        return self.attention.step(
            h, packing=sight.packing, rotation=rotation, cache=past.kept, position=past.position
        )


def _norm(h: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
    return F.rms_norm(h, (h.shape[-1],))
