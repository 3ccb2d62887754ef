"""What compares or mixes the tokens of a row is refused where ranks share rows."""

import pytest

from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Float, Tensor
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import HostMemory
from moesaic.model.transformer import Transformer
from moesaic.moe.attention_experts import MixtureOfAttention
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.expert_capacity import RowCapacity
from moesaic.moe.expert_selection import TopK
from moesaic.moe.expert_selection_dynamic import ExpertChoice
from moesaic.moe.soft_moe import SoftMoE
from moesaic.nn.attention import Attention
from moesaic.nn.decode_state import DecodeState
from moesaic.nn.sequence_mixer import MixerContext, MixerShape, SequenceMixer, SequenceMixerModule
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel, whole_row_problems
from moesaic.testing.tiny_models import BALANCED_TOP1, tiny_model_config

ONE = ParallelPlan(data=1)
SHARED_ROWS = (ParallelPlan(data=1, context=2), ParallelPlan(data=1, tensor=2))
BY_ROW: dict[str, SparseLayer] = {
    "ExpertChoice": MoE(experts=4, select=ExpertChoice(), balance=()),
    "SoftMoE": SoftMoE(experts=2),
    "RowCapacity": MoE(experts=4, limit=RowCapacity(number=2)),
}


@pytest.mark.parametrize("plan", SHARED_ROWS, ids=str)
@pytest.mark.parametrize("rule", BY_ROW)
def test_routing_of_whole_rows_is_refused_with_the_way_out(rule: str, plan: ParallelPlan) -> None:
    model = Transformer(tiny_model_config(moe=BY_ROW[rule]))
    with pytest.raises(ConfigError, match=f"{rule} of the encoder .* context x tensor = 2 ranks"):
        check_parallel(model, parallel=ParallelConfig(plan=plan), plan=plan)


@pytest.mark.parametrize("rule", BY_ROW)
def test_it_is_allowed_where_rows_are_whole(rule: str) -> None:
    assert not list(whole_row_problems(tiny_model_config(moe=BY_ROW[rule]), ranks=1))


@pytest.mark.parametrize("moe", [NoMoE(), MoE(experts=4, select=TopK(k=2))])
def test_routing_of_single_tokens_is_allowed(moe: SparseLayer) -> None:
    assert not list(whole_row_problems(tiny_model_config(moe=moe), ranks=4))


class MeanModule(SequenceMixerModule):
    """A mixer of somebody's own: every token receives the mean of its row."""

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        del state
        rows = context.packing.pad(x)
        return context.packing.pack(rows.mean(1, keepdim=True).expand_as(rows))


class MeanOfRow(SequenceMixer):
    """Family member that a plug-in defines."""

    def build(self, shape: MixerShape, /) -> MeanModule:
        del shape
        return MeanModule()


@pytest.mark.parametrize("plan", SHARED_ROWS, ids=str)
def test_a_mixer_that_declares_no_sharding_is_refused(plan: ParallelPlan) -> None:
    model = Transformer(tiny_model_config().replace(mixers={"attention": MeanOfRow()}))
    with pytest.raises(ConfigError, match=r"MeanModule of encoder.0.mixer.inner .*set .* to 1"):
        check_parallel(model, parallel=ParallelConfig(plan=plan), plan=plan)
    check_parallel(model, parallel=ParallelConfig(plan=ONE), plan=ONE)


@pytest.mark.parametrize("mixer", [Attention(), MixtureOfAttention()], ids=str)
def test_our_attentions_run_under_context_parallelism(mixer: SequenceMixer) -> None:
    model = Transformer(tiny_model_config().replace(mixers={"attention": mixer}))
    plan = ParallelPlan(data=1, context=2)
    check_parallel(model, parallel=ParallelConfig(plan=plan), plan=plan)


def test_a_tier_of_parameters_is_refused_where_zero_leaves_nothing_to_it() -> None:
    parallel = ParallelConfig(memory=MemoryPlan(parameters=HostMemory()))
    plan = ParallelPlan(data=2, zero=1)
    dense, sparse = (Transformer(tiny_model_config(moe=moe)) for moe in (NoMoE(), BALANCED_TOP1))
    with pytest.raises(ConfigError, match=r"parameters=HostMemory with parallel\.plan\.zero=1"):
        check_parallel(dense, parallel=parallel, plan=plan)
    check_parallel(dense, parallel=parallel, plan=ParallelPlan(data=2))
    with pytest.raises(ConfigError, match=r"over the 2 ranks with copies of each: set .*expert"):
        check_parallel(sparse, parallel=parallel, plan=plan)
    check_parallel(sparse, parallel=parallel, plan=plan.replace(expert=2))
