"""The MoE layer. Read ``forward``; everything else is in the names it calls.

Letters: T tokens, D model dim.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.moe.config import MoE
from moesaic.moe.context import Carry, Context
from moesaic.moe.dispatch import Dispatcher, LocalDispatcher
from moesaic.moe.experts import Size
from moesaic.moe.gates import Place
from moesaic.moe.ranks import OneRank, Ranks
from moesaic.moe.record import Record
from moesaic.moe.router import Router
from moesaic.moe.spare import working
from moesaic.nn.feed_forward import FeedForwardConfig


@dataclass(frozen=True, slots=True)
class Answer:
    """A layer's output, what its router did (None where there is none), and what is handed on."""

    out: Float[Tensor, "T D"]
    record: Record | None
    carry: Carry


class MoELayer(nn.Module):
    """Router, dispatcher, experts. ``place.name`` is the layer's name in records."""

    def __init__(
        self, config: MoE, *, dim: int, feed_forward: FeedForwardConfig, bias: bool, place: Place
    ) -> None:
        super().__init__()
        feed = config.feed_forward(feed_forward)
        self.router = Router(config, dim=dim, place=place)
        self.exchange = config.exchange.build(dim=dim)
        self.experts = config.expert.build(
            Size(config.experts, config.exchange.dim(dim), feed, bias)
        )
        self.beside = config.beside.build(feed_forward=feed, dim=dim, bias=bias)
        self.spare = config.spare
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.ranks: Ranks = OneRank()
        self.name = place.name

    def forward(self, x: Float[Tensor, "T D"], *, context: Context, carry: Carry) -> Answer:
        """Return the experts' answer and what the router did. ``x`` holds real tokens only."""
        routed = self.router(x, context=context.at(self.name), carry=carry, ranks=self.ranks)
        spare = self.spare.count()
        edges = working(routed.routing, spare=spare)
        rows = self.exchange.enter(x)
        home = self.dispatcher.carry(rows, routing=edges, experts=self.experts)
        mixed = self.spare.add(self.exchange.leave(home), x=x, routing=routed.routing)
        out = self.beside(x, mixed=mixed)
        record = Record.of(self.name, routed, context=context, spare=spare)
        return Answer(out, record, routed.carry)


def layers(model: nn.Module) -> Iterator[MoELayer]:
    """Yield the MoE layers of a model."""
    return (module for module in model.modules() if isinstance(module, MoELayer))


def set_ranks(model: nn.Module, ranks: Ranks) -> None:
    """Tell every MoE layer which ranks share its batch."""
    for layer in layers(model):
        layer.ranks = ranks


def set_dispatcher(model: nn.Module, dispatcher: Dispatcher) -> None:
    """Give every MoE layer the dispatcher that knows where its experts live."""
    for layer in layers(model):
        layer.dispatcher = dispatcher


def hear(model: nn.Module, records: Iterable[Record]) -> None:
    """Let the routers remember a micro-batch, once, after its backward pass."""
    sums = {record.layer: record.sums for record in records}
    for layer in layers(model):
        heard = sums.get(layer.name)
        if heard is not None:
            layer.router.hear(heard)


def learn(model: nn.Module) -> None:
    """Let the rules of every router learn from an optimizer step that is done."""
    for layer in layers(model):
        layer.router.learn()


def forget(model: nn.Module) -> None:
    """Let the routers forget a step that was not taken."""
    for layer in layers(model):
        layer.router.forget()
