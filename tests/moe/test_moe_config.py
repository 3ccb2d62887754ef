"""An MoE config round-trips through YAML."""

from moesaic.core.config import Config
from moesaic.moe.auxiliary_losses import RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.expert_capacity import Capacity, PositionPriority
from moesaic.moe.expert_selection import TopK
from moesaic.moe.router_noise import Jitter


class Holder(Config):
    sparse: SparseLayer


def test_a_mixture_round_trips_through_yaml():
    moe = MoE(
        experts=8,
        hidden=32,
        select=TopK(k=3, normalise="after"),
        limit=Capacity(factor=2.0, priority=PositionPriority()),
        balance=(SwitchBalance(weight=0.1), RouterZLoss()),
        noise=Jitter(epsilon=0.02),
    )
    for sparse in (moe, NoMoE()):
        holder = Holder(sparse=sparse)
        assert Holder.from_yaml(holder.to_yaml()) == holder
