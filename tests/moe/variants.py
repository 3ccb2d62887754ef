"""Every routing rule of the house under a name, for the laws."""

import torch
from torch import nn

from moesaic.moe.config import MoE
from moesaic.moe.context import Carry, Context
from moesaic.moe.gates import Place
from moesaic.moe.layer import MoELayer
from moesaic.moe.limit import AtRandom, ByPosition, ByWeight, Capacity
from moesaic.moe.record import Record
from moesaic.moe.select import SwitchTop1, Top2, TopK
from moesaic.nn.activation import ReLU, SwiGLU
from moesaic.nn.feed_forward import FeedForward

DIM, HIDDEN, EXPERTS = 12, 20, 5
SELECTS = {
    "switch": SwitchTop1(),
    "top1": TopK(k=1, normalise="none"),
    "top2": TopK(k=2),
    "top3-after": TopK(k=3, normalise="after"),
    "top2-none": TopK(k=2, normalise="none"),
    "gshard": Top2(),
    "gshard-sampled": Top2(second="sampled"),
}
LIMITS = {
    "dropless": None,
    "by-position": ByPosition(),
    "by-weight": ByWeight(),
    "at-random": AtRandom(),
}


def mixture(select: str, limit: str) -> MoE:
    """The config of a named pair; limited ones have room for little more than half of the edges."""
    free = MoE(experts=EXPERTS, select=SELECTS[select])
    priority = LIMITS[limit]
    if priority is None:
        return free
    return free.replace(limit=Capacity(factor=0.6, eval_factor=0.6, minimum=0, priority=priority))


def layer(config: MoE, *, gated: bool = True, bias: bool = False) -> MoELayer:
    """A layer with weights of a useful size."""
    feed = FeedForward(hidden=HIDDEN, activation=SwiGLU() if gated else ReLU())
    made = MoELayer(config, dim=DIM, feed_forward=feed, bias=bias, place=Place("test.0"))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def run(made: MoELayer, x: torch.Tensor) -> tuple[torch.Tensor, Record]:
    """The layer's answer and record for tokens that belong to no batch."""
    answer = made(x, context=Context.plain(len(x)), carry=Carry())
    return answer.out, answer.record
