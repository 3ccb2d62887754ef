"""The bytes of a rank follow the plan; that they are the real ones is a law of its own."""

import math

import pytest

from moesaic.core.errors import ConfigError, UserError
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_count import BatchDims, count_parameters
from moesaic.model.training_memory import estimate_training_memory
from moesaic.moe.config import MoE, NoMoE
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.moe_kernel import UnfusedMoEKernel
from moesaic.optim.optimizer import Muon
from moesaic.parallel.activation_checkpointing import CheckpointBlocks
from moesaic.parallel.communication_volume import communication_volume
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.context_parallel import Ring
from moesaic.parallel.memory_estimate import (
    MIXED_PRECISION,
    EstimateSettings,
    MemoryBudget,
    RankMemory,
    estimate_memory,
    largest_fitting_model,
    with_experts,
)
from moesaic.parallel.parameter_inventory import ParameterInventory, RankParameters
from parallel.communication_cases import BOTH, DECODER, SIZES, parallel


def held(config: ModelConfig, laid: ParallelConfig, world: int, rank: int = 0) -> RankParameters:
    return ParameterInventory(config).on_rank(laid, world=world, rank=rank)


@pytest.mark.parametrize("config", [BOTH, DECODER])
def test_one_rank_holds_what_the_model_takes(config: ModelConfig) -> None:
    found = estimate_memory(held(config, parallel(), 1), sizes=SIZES)
    alone = estimate_training_memory(
        config, sizes=BatchDims(1, 2 * 8 if config.encoder.layers else 0, 2 * 16)
    )
    assert (found.weights, found.gradients) == (alone.weights, alone.gradients)
    assert found.activations == pytest.approx(alone.activations, rel=0.01)
    assert found.gathered == found.host == 0


def test_all_ranks_together_hold_each_value_once_when_everything_is_shared_out() -> None:
    plan = parallel(expert=4, tensor=2, zero=3)
    inventory = ParameterInventory(DECODER)
    holdings = [inventory.on_rank(plan, world=8, rank=rank) for rank in range(8)]
    found = [estimate_memory(holding, sizes=SIZES).weights for holding in holdings]
    # what no axis cuts is shared out over data, and copied over the two tensor ranks
    copied = {
        part.parameter.name for part in holdings[0].shards if "tensor" in part.all_reduce_axes
    }
    twice = sum(math.prod(i.placement.shape) for i in inventory.parameters if i.name in copied)
    assert sum(found) == 4 * (count_parameters(DECODER).total + twice)


def test_offloading_moves_the_shares_and_nothing_else() -> None:
    on, off = (
        estimate_memory(held(BOTH, parallel(expert=2, zero=2, offload=there), 4), sizes=SIZES)
        for there in (False, True)
    )
    assert off.host == on.state == off.state
    assert off.device == on.device - off.host


def test_experts_without_a_copy_stay_on_the_device() -> None:
    found = estimate_memory(held(BOTH, parallel(expert=4, zero=2, offload=True), 4), sizes=SIZES)
    experts = 2 * 16 * (2 * 24 + 24) * 4  # two banks of one expert each
    assert found.state - found.host >= 4 * experts


def test_mixed_precision_costs_as_much_state_and_half_the_activations() -> None:
    holding = held(BOTH, parallel(expert=2), 4)
    plain, mixed = (
        estimate_memory(holding, sizes=SIZES, bytes_per_value=s) for s in (None, MIXED_PRECISION)
    )
    assert mixed.weights * 2 == plain.weights
    assert mixed.state == plain.state
    assert mixed.activations * 2 == plain.activations


def test_the_optimizer_is_asked() -> None:
    holding = held(BOTH, parallel(expert=2), 4)
    adamw, muon = (estimate_memory(holding, sizes=SIZES, optimizer=o) for o in (None, Muon()))
    assert muon.optimizer < adamw.optimizer


def test_later_stages_of_zero_hold_less_at_once() -> None:
    found = [
        estimate_memory(held(BOTH, parallel(expert=2, zero=stage), 8), sizes=SIZES)
        for stage in (1, 2, 3)
    ]
    peaks = [each.device for each in found]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_gradients_of_stage_one_travel_once_a_step() -> None:
    def reduced(stage: int, micro_batches: int) -> int:
        holding = held(BOTH, parallel(expert=2, zero=stage), 4)
        lines = communication_volume(holding, sizes=SIZES, micro_batches=micro_batches)
        return sum(line.bytes for line in lines if line.kind == "reduce-scatter")

    assert reduced(1, 4) == reduced(1, 1) == reduced(2, 1)
    assert reduced(2, 4) == 4 * reduced(2, 1)


def test_what_is_not_forecast_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="pipe=2"):
        held(BOTH, parallel(pipe=2), 4)
    ring = ParallelConfig(plan=parallel(context=2).plan, context_parallel=Ring())
    with pytest.raises(ConfigError, match=r"context_parallel=Ring.*Ulysses"):
        held(BOTH, ring, 4)
    again = parallel().replace(activation_checkpointing=CheckpointBlocks())
    with pytest.raises(
        ConfigError, match=r"activation_checkpointing=CheckpointBlocks.*NoCheckpointing"
    ):
        held(BOTH, again, 4)
    with pytest.raises(UserError, match="choose other rows"):
        estimate_memory(held(BOTH, parallel(tensor=2), 4), sizes=BatchDims(1, 8, 5))


def test_the_composed_mixture_keeps_more_than_the_compiled_one() -> None:
    holding = held(BOTH, parallel(expert=4), 4)
    composed = UnfusedMoEKernel(SequentialGEMM())
    fused = estimate_memory(holding, sizes=SIZES)
    plain = estimate_memory(holding, sizes=SIZES, kernel=composed)
    assert plain.activations >= fused.activations


def test_the_largest_model_fits_and_one_expert_more_does_not() -> None:
    setting = EstimateSettings(parallel(expert=4, zero=3), 8, SIZES)
    budget = MemoryBudget(device=3e5)
    found = largest_fitting_model(DECODER, settings=setting, budget=budget)
    assert found is not None
    assert found.memory == setting.estimate(with_experts(DECODER, found.experts))
    assert budget.fits(found.memory)
    assert not budget.fits(setting.estimate(with_experts(DECODER, found.experts + 4)))
    assert found.parameters == count_parameters(with_experts(DECODER, found.experts)).total


def test_the_memory_of_the_host_is_a_limit_too() -> None:
    setting = EstimateSettings(parallel(expert=4, zero=3, offload=True), 8, SIZES)
    free = largest_fitting_model(DECODER, settings=setting, budget=MemoryBudget(3e5))
    bound = largest_fitting_model(DECODER, settings=setting, budget=MemoryBudget(3e5, host=1e5))
    assert free is not None
    assert bound is not None
    assert bound.experts < free.experts
    assert bound.memory.host <= 1e5
    assert largest_fitting_model(DECODER, settings=setting, budget=MemoryBudget(1e3)) is None


def test_capacity_wants_one_number_of_experts() -> None:
    with pytest.raises(UserError, match="one number of experts in all layers"):
        with_experts(DECODER.replace(moe=NoMoE()), 8)
    pyramid = DECODER.decoder.replace(experts_per_layer=(8, 16))
    with pytest.raises(UserError, match=r"decoder\.experts_per_layer"):
        with_experts(DECODER.replace(decoder=pyramid, moe=MoE(experts=8)), 8)


def test_a_rank_needs_on_the_device_what_is_not_in_the_host() -> None:
    found = RankMemory(weights=1, gradients=2, optimizer=4, gathered=8, activations=16, host=3)
    assert found.state == 7
    assert found.device == 28
