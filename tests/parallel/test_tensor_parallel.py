"""Models that tensor parallelism cannot shard are refused with the way out."""

import pytest

from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.qk_norm import AcrossHeadsQKNorm
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel
from moesaic.testing.tiny_models import tiny_model_config

MODEL = tiny_model_config()
REFUSED = {
    "has 2 heads": (MODEL, 4),
    "has 1 kv_heads": (MODEL.replace(attention=AttentionConfig(heads=2, kv_heads=1)), 2),
    "normalises .* all heads": (
        MODEL.replace(attention=AttentionConfig(heads=2, qk_norm=AcrossHeadsQKNorm())),
        2,
    ),
    "belong to attention experts.*set tensor to 1": (
        MODEL.replace(mixers={"attention": MixtureOfAttention()}),
        2,
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_sharded_is_refused_with_the_reason(why: str) -> None:
    config, ranks = REFUSED[why]
    plan = ParallelPlan(data=1, tensor=ranks)
    with pytest.raises(ConfigError, match=f"parallel.tensor={ranks}.*{why}"):
        check_parallel(Transformer(config), parallel=ParallelConfig(plan=plan), plan=plan)


def test_attention_experts_are_allowed_without_tensor_parallelism() -> None:
    config, plan = MODEL.replace(mixers={"attention": MixtureOfAttention()}), ParallelPlan(data=2)
    check_parallel(Transformer(config), parallel=ParallelConfig(plan=plan), plan=plan)
