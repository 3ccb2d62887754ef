"""The sparse family reads and writes itself."""

from moesaic.core.config import Config
from moesaic.moe.balance import RouterZ, SwitchBalance
from moesaic.moe.config import MoE, NoMoE, Sparse
from moesaic.moe.limit import ByPosition, Capacity
from moesaic.moe.noise import Jitter
from moesaic.moe.select import TopK


class Holder(Config):
    sparse: Sparse


def test_a_mixture_round_trips_through_yaml():
    moe = MoE(
        experts=8,
        hidden=32,
        select=TopK(k=3, normalise="after"),
        limit=Capacity(factor=2.0, priority=ByPosition()),
        balance=(SwitchBalance(weight=0.1), RouterZ()),
        noise=Jitter(epsilon=0.02),
    )
    for sparse in (moe, NoMoE()):
        holder = Holder(sparse=sparse)
        assert Holder.from_yaml(holder.to_yaml()) == holder
