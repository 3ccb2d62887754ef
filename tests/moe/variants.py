"""Every routing rule of the house under a name, for the laws."""

import torch
from torch import nn

from moesaic.moe.balance import Balance, RouterZLoss, SwitchBalance
from moesaic.moe.balances.adaptive import AdaptiveBalance
from moesaic.moe.balances.bias import BiasUpdate
from moesaic.moe.balances.device import DeviceBalance
from moesaic.moe.balances.entropy import EntropyBalance
from moesaic.moe.balances.global_batch import GlobalBatchBalance, MicroBatchBalance
from moesaic.moe.balances.importance import ImportanceBalance
from moesaic.moe.balances.sequence import SequenceBalance
from moesaic.moe.bodies.lora import LoRAExpert
from moesaic.moe.bodies.narrow import DownProjection
from moesaic.moe.bodies.residual import ResidualExpert
from moesaic.moe.bodies.shared import GatedSharedExperts, SharedExperts
from moesaic.moe.config import MoE
from moesaic.moe.context import RouterState, TokenContext
from moesaic.moe.gates import LayerIndex
from moesaic.moe.layer import MoELayer
from moesaic.moe.limit import RandomPriority, PositionPriority, WeightPriority, Capacity, Dropless
from moesaic.moe.record import RoutingRecord
from moesaic.moe.select import SwitchTop1, Top2, TopK
from moesaic.moe.selects.dense_all import DenseAll, ThresholdAtInference
from moesaic.moe.selects.expert_choice import ExpertChoice
from moesaic.moe.selects.hash import Hash
from moesaic.moe.selects.null_top_k import NullTopK
from moesaic.moe.selects.sigmoid import SigmoidTopK
from moesaic.moe.selects.threshold import Threshold
from moesaic.moe.selects.top_p import TopP
from moesaic.moe.spare import IdentityExperts, NoNullExperts, ZeroExperts
from moesaic.nn.activation import ReLU, SwiGLU
from moesaic.nn.feed_forward import FeedForwardConfig

DIM, HIDDEN, EXPERTS = 12, 20, 5
SELECTS = {
    "switch": SwitchTop1(),
    "top1": TopK(k=1, normalise="none"),
    "top2": TopK(k=2),
    "top3-after": TopK(k=3, normalise="after"),
    "top2-none": TopK(k=2, normalise="none"),
    "gshard": Top2(),
    "gshard-sampled": Top2(second="sampled"),
    "sigmoid": SigmoidTopK(k=2, scale=1.5),
    "top-p": TopP(p=0.6),
    "top-p-capped": TopP(p=0.8, max_experts=2),
    "null": NullTopK(k=3),
    "hash": Hash(),
    "dense-all": DenseAll(),
    "dense-all-threshold": DenseAll(inference=ThresholdAtInference()),
    "threshold": Threshold(),
    "expert-choice": ExpertChoice(),
}
SPARES = {"null": ZeroExperts(number=2)}
BODIES = {  # fields of a mixture: what an expert is, and what stands around it
    "shared": {"beside": SharedExperts(number=2)},
    "gated-shared": {"beside": GatedSharedExperts()},
    "residual": {"beside": ResidualExpert()},
    "narrow": {"exchange": DownProjection(ratio=0.5)},
    "lora": {"expert": LoRAExpert(rank=3)},
    "null": {"spare": ZeroExperts(number=2)},
    "identity": {"spare": IdentityExperts(number=2)},
}
LIMITS = {
    "dropless": None,
    "by-position": PositionPriority(),
    "by-weight": WeightPriority(),
    "at-random": RandomPriority(),
}
BALANCES: dict[str, tuple[Balance, ...]] = {
    "switch-and-z": (SwitchBalance(weight=0.3), RouterZLoss(weight=0.1)),
    "sequence": (SequenceBalance(weight=0.3),),
    "device": (DeviceBalance(weight=0.3, num_groups=2),),
    "importance": (ImportanceBalance(weight=0.3),),
    "entropy": (EntropyBalance(weight=0.3),),
    "adaptive": (AdaptiveBalance(weight=0.3, log_step=0.5),),
    "global-batch": (GlobalBatchBalance(weight=0.3),),
    "micro-batch": (MicroBatchBalance(weight=0.3),),
    "bias-and-sequence": (BiasUpdate(rate=0.05), SequenceBalance(weight=0.3)),
}


def balanced(name: str) -> MoE:
    """A mixture of four experts with the named terms, and a limit where one needs it."""
    limit = Capacity(factor=0.8, minimum=0) if name == "adaptive" else Dropless()
    return MoE(experts=4, select=TopK(k=2), balance=BALANCES[name], limit=limit)


def mixture(select: str, limit: str) -> MoE:
    """The config of a named pair; limited ones have room for little more than half of the edges."""
    free = MoE(experts=EXPERTS, select=SELECTS[select], null_experts=SPARES.get(select, NoNullExperts()))
    priority = LIMITS[limit]
    if priority is None:
        return free
    return free.replace(limit=Capacity(factor=0.6, eval_factor=0.6, minimum=0, priority=priority))


def layer(config: MoE, *, gated: bool = True, bias: bool = False) -> MoELayer:
    """A layer with weights of a useful size."""
    feed = FeedForwardConfig(hidden=HIDDEN, activation=SwiGLU() if gated else ReLU())
    made = MoELayer(config, dim=DIM, feed_forward=feed, bias=bias, layer_index=LayerIndex("test.0"))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def run(made: MoELayer, x: torch.Tensor) -> tuple[torch.Tensor, RoutingRecord]:
    """The layer's answer and record for tokens that belong to no batch."""
    answer = made(x, context=TokenContext.unbatched(len(x)), carry=RouterState())
    return answer.out, answer.record
