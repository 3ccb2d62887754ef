"""Routing rules by name, for the laws."""

import torch
from torch import nn

from moesaic.moe.adaptive_auxiliary_losses import AdaptiveBalance
from moesaic.moe.auxiliary_losses import (
    Balance,
    DeviceBalance,
    EntropyBalance,
    FirstChoiceBalance,
    GlobalBatchBalance,
    ImportanceBalance,
    MicroBatchBalance,
    RouterZLoss,
    SequenceBalance,
    SwitchBalance,
)
from moesaic.moe.config import MoE
from moesaic.moe.dispatch_projection import DownProjection
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import (
    BatchPriority,
    Capacity,
    Dropless,
    PositionPriority,
    RandomPriority,
    WeightPriority,
)
from moesaic.moe.expert_selection import Hash, NullTopK, SigmoidTopK, SwitchTop1, Top2, TopK
from moesaic.moe.expert_selection_dynamic import (
    DenseAll,
    ExpertChoice,
    Threshold,
    ThresholdAtInference,
    TopP,
)
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.layer import MoELayer
from moesaic.moe.null_experts import IdentityExperts, NoNullExperts, ZeroExperts
from moesaic.moe.router_context import RouterState, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.moe.routing_record import RoutingRecord
from moesaic.moe.shared_experts import GatedSharedExperts, ResidualExpert, SharedExperts
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU, SwiGLU

DIM, HIDDEN, EXPERTS = 12, 20, 5
SELECTS = {
    "switch": SwitchTop1(),
    "top1": TopK(k=1, normalise="none"),
    "top2": TopK(k=2),
    "top3-after": TopK(k=3, normalise="after"),
    "top2-none": TopK(k=2, normalise="none"),
    "gshard": Top2(),
    "gshard-sampled": Top2(second="sampled"),
    "gshard-random": Top2(second="random", normalise="after", scale=0.8),
    "scaled-probabilities": TopK(k=2, scale=2.5, scores="probabilities"),
    "sigmoid": SigmoidTopK(k=2, scale=1.5),
    "sigmoid-none": SigmoidTopK(k=2, normalise="none"),
    "top-p": TopP(p=0.6),
    "top-p-capped": TopP(p=0.8, max_experts=2),
    "null": NullTopK(k=3),
    "hash": Hash(),
    "dense-all": DenseAll(),
    "dense-all-threshold": DenseAll(inference=ThresholdAtInference()),
    "threshold": Threshold(),
    "expert-choice": ExpertChoice(),
}
NULL_EXPERTS = {"null": ZeroExperts(number=2)}
LAYER_PARTS = {  # fields of an MoE config: expert type, shared experts, projection, null experts
    "shared": {"shared_experts": SharedExperts(number=2)},
    "gated-shared": {"shared_experts": GatedSharedExperts()},
    "residual": {"shared_experts": ResidualExpert()},
    "narrow": {"dispatch_projection": DownProjection(ratio=0.5)},
    "lora": {"expert": LoRAExpert(rank=3)},
    "weighted-inputs": {"weights_on": "inputs"},
    "null": {"null_experts": ZeroExperts(number=2)},
    "identity": {"null_experts": IdentityExperts(number=2)},
}
LIMITS = {
    "dropless": None,
    "by-position": PositionPriority(),
    "by-weight": WeightPriority(),
    "by-token": BatchPriority(),
    "at-random": RandomPriority(),
}
BALANCES: dict[str, tuple[Balance, ...]] = {
    "switch-and-z": (SwitchBalance(weight=0.3), RouterZLoss(weight=0.1)),
    "sequence": (SequenceBalance(weight=0.3),),
    "first-choice": (FirstChoiceBalance(weight=0.3),),
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
    """The config of a named pair; the capacity limit keeps about half of the edges."""
    free = MoE(
        experts=EXPERTS,
        select=SELECTS[select],
        null_experts=NULL_EXPERTS.get(select, NoNullExperts()),
    )
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
    """The layer's output and record for tokens of no batch."""
    answer = made(x, context=TokenContext.unbatched(len(x)), router_state=RouterState())
    return answer.out, answer.record
