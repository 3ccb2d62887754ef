"""Small models and plans that are estimated, simulated, and run on real ranks."""

from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm
from moesaic.parallel.config import ParallelConfig

BOTH = ModelConfig(
    vocab_size=40,
    dim=16,
    encoder=Stack(layers=2, moe_every=2),
    decoder=Stack(layers=2, moe_every=2),
    attention=AttentionConfig(heads=4, kv_heads=2),
    feed_forward=FeedForwardConfig(hidden=24),
    moe=MoE(experts=4, select=TopK(k=2)),
)
BIASED = BOTH.replace(
    feed_forward=FeedForwardConfig(hidden=24, activation=ReLU()),
    norm=LayerNorm(bias=True),
    bias=True,
    moe=MoE(experts=4, select=SwitchTop1(), limit=Capacity(factor=1.0)),
)
DECODER = BOTH.replace(
    encoder=Stack(layers=0),
    decoder=Stack(layers=3, sparse_layers=(0, 2)),
    moe=MoE(experts=8, hidden=12, select=TopK(k=2), shared_experts=SharedExperts()),
    embedding=EmbeddingConfig(tied=False),
)
SIZES = BatchDims(rows=2, source=8, target=16)


def parallel(**degrees: object) -> ParallelConfig:
    """Return a plan of these degrees."""
    return ParallelConfig(plan=ParallelPlan(**degrees))
