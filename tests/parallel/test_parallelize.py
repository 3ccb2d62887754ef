"""Routing that compares the tokens of a row is refused where ranks share rows."""

import pytest

from moesaic.core.errors import ConfigError
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.expert_selection import TopK
from moesaic.moe.expert_selection_dynamic import ExpertChoice
from moesaic.moe.soft_moe import SoftMoE
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import check_parallel, whole_row_problems
from moesaic.testing.tiny_models import tiny_model_config

BY_ROW: dict[str, SparseLayer] = {
    "ExpertChoice": MoE(experts=4, select=ExpertChoice(), balance=()),
    "SoftMoE": SoftMoE(experts=2),
}


@pytest.mark.parametrize("rule", BY_ROW)
def test_routing_of_whole_rows_is_refused_with_the_way_out(rule: str) -> None:
    model = Transformer(tiny_model_config(moe=BY_ROW[rule]))
    plan = ParallelPlan(data=1, context=2)
    with pytest.raises(ConfigError, match=f"{rule} of the encoder .* context x tensor = 2 ranks"):
        check_parallel(model, parallel=ParallelConfig(plan=plan), plan=plan)


@pytest.mark.parametrize("rule", BY_ROW)
def test_it_is_allowed_where_rows_are_whole(rule: str) -> None:
    assert not list(whole_row_problems(tiny_model_config(moe=BY_ROW[rule]), ranks=1))


@pytest.mark.parametrize("moe", [NoMoE(), MoE(experts=4, select=TopK(k=2))])
def test_routing_of_single_tokens_is_allowed(moe: SparseLayer) -> None:
    assert not list(whole_row_problems(tiny_model_config(moe=moe), ranks=4))
