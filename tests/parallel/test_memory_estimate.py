"""The bytes of a rank follow the plan; that they are the real ones is a law of its own."""

import math

import pytest

from moesaic.core.errors import ConfigError, UserError
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import DeviceMemory, HostMemory
from moesaic.model.config import ModelConfig
from moesaic.model.parameter_flop_count import BatchDims, count_parameters
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
    EstimateSettings,
    MemoryBudget,
    RankMemory,
    estimate_memory,
    largest_fitting_model,
    with_experts,
)
from moesaic.parallel.parameter_inventory import ParameterInventory, RankParameters
from moesaic.parallel.precision import BFloat16
from parallel.communication_cases import BOTH, DECODER, SIZES, parallel


def on_rank(
    config: ModelConfig, parallel_: ParallelConfig, world: int, rank: int = 0
) -> RankParameters:
    return ParameterInventory(config).on_rank(parallel_, world=world, rank=rank)


@pytest.mark.parametrize("config", [BOTH, DECODER])
def test_one_rank_has_the_memory_of_the_model(config: ModelConfig) -> None:
    memory = estimate_memory(on_rank(config, parallel(), 1), sizes=SIZES)
    expected = estimate_training_memory(
        config, sizes=BatchDims(1, 2 * 8 if config.encoder.layers else 0, 2 * 16)
    )
    assert (memory.weights, memory.gradients) == (expected.weights, expected.gradients)
    assert memory.activations == pytest.approx(expected.activations, rel=0.01)
    assert memory.gathered == memory.host == 0


def test_zero_shards_each_value_once_over_all_ranks() -> None:
    plan = parallel(expert=4, tensor=2, zero=3)
    inventory = ParameterInventory(DECODER)
    ranks = [inventory.on_rank(plan, world=8, rank=rank) for rank in range(8)]
    memory = [estimate_memory(parameters, sizes=SIZES).weights for parameters in ranks]
    # unsharded parameters are sharded over data by ZeRO, and replicated over two tensor ranks
    copied = {part.parameter.name for part in ranks[0].shards if "tensor" in part.all_reduce_axes}
    twice = sum(math.prod(i.placement.shape) for i in inventory.parameters if i.name in copied)
    assert sum(memory) == 4 * (count_parameters(DECODER).total + twice)


OFFLOADED = MemoryPlan(
    parameters=HostMemory(), gradients=HostMemory(), optimizer_states=HostMemory()
)


def test_tiers_take_gradients_and_states_with_or_without_copies_off_the_device() -> None:
    resident = parallel(expert=4, zero=2)
    on, off = (
        estimate_memory(on_rank(BOTH, resident.replace(memory=memory), 4), sizes=SIZES)
        for memory in (MemoryPlan(), OFFLOADED.replace(parameters=DeviceMemory()))
    )
    assert off.host == on.gradients + on.optimizer
    assert off.device == on.device - off.host


def test_mixed_precision_halves_activations_but_not_state() -> None:
    parameters = on_rank(BOTH, parallel(expert=2), 4)
    plain, mixed = (
        estimate_memory(parameters, sizes=SIZES, precision=p) for p in (None, BFloat16())
    )
    assert mixed.weights * 2 == plain.weights
    assert mixed.state == plain.state
    assert mixed.activations * 2 == plain.activations


def test_optimizer_state_depends_on_the_optimizer() -> None:
    parameters = on_rank(BOTH, parallel(expert=2), 4)
    adamw, muon = (estimate_memory(parameters, sizes=SIZES, optimizer=o) for o in (None, Muon()))
    assert muon.optimizer < adamw.optimizer


def test_later_stages_of_zero_need_less_memory() -> None:
    memory = [
        estimate_memory(on_rank(BOTH, parallel(expert=2, zero=stage), 8), sizes=SIZES)
        for stage in (1, 2, 3)
    ]
    peaks = [each.device for each in memory]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_zero_1_reduces_gradients_once_per_step() -> None:
    def reduced(stage: int, micro_batches: int) -> int:
        parameters = on_rank(BOTH, parallel(expert=2, zero=stage), 4)
        lines = communication_volume(parameters, sizes=SIZES, micro_batches=micro_batches)
        return sum(line.bytes for line in lines if line.kind == "reduce-scatter")

    assert reduced(1, 4) == reduced(1, 1) == reduced(2, 1)
    assert reduced(2, 4) == 4 * reduced(2, 1)


def test_what_is_not_estimated_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="pipe=2"):
        on_rank(BOTH, parallel(pipe=2), 4)
    ring = ParallelConfig(plan=parallel(context=2).plan, context_parallel=Ring())
    with pytest.raises(ConfigError, match=r"context_parallel=Ring.*Ulysses"):
        on_rank(BOTH, ring, 4)
    checkpointing = parallel().replace(activation_checkpointing=CheckpointBlocks())
    with pytest.raises(
        ConfigError, match=r"activation_checkpointing=CheckpointBlocks.*NoActivationCheckpointing"
    ):
        on_rank(BOTH, checkpointing, 4)
    with pytest.raises(UserError, match="choose other rows"):
        estimate_memory(on_rank(BOTH, parallel(tensor=2), 4), sizes=BatchDims(1, 8, 5))


def test_the_unfused_kernel_keeps_more_activations_than_the_fused_one() -> None:
    parameters = on_rank(BOTH, parallel(expert=4), 4)
    unfused = UnfusedMoEKernel(SequentialGEMM())
    fused = estimate_memory(parameters, sizes=SIZES)
    plain = estimate_memory(parameters, sizes=SIZES, kernel=unfused)
    assert plain.activations >= fused.activations


def test_the_largest_model_fits_and_one_expert_more_does_not() -> None:
    settings = EstimateSettings(parallel(expert=4, zero=3), 8, SIZES)
    budget = MemoryBudget(device=3e5)
    largest = largest_fitting_model(DECODER, settings=settings, budget=budget)
    assert largest is not None
    assert largest.memory == settings.estimate(with_experts(DECODER, largest.experts))
    assert budget.fits(largest.memory)
    assert not budget.fits(settings.estimate(with_experts(DECODER, largest.experts + 4)))
    assert largest.parameters == count_parameters(with_experts(DECODER, largest.experts)).total


def test_host_memory_is_a_limit_too() -> None:
    settings = EstimateSettings(parallel(expert=4, zero=3).replace(memory=OFFLOADED), 8, SIZES)
    free = largest_fitting_model(DECODER, settings=settings, budget=MemoryBudget(3e5))
    bound = largest_fitting_model(DECODER, settings=settings, budget=MemoryBudget(3e5, host=1e5))
    assert free is not None
    assert bound is not None
    assert bound.experts < free.experts
    assert bound.memory.host <= 1e5
    assert largest_fitting_model(DECODER, settings=settings, budget=MemoryBudget(1e3)) is None


def test_the_largest_model_needs_one_number_of_experts() -> None:
    with pytest.raises(UserError, match="one number of experts in all layers"):
        with_experts(DECODER.replace(moe=NoMoE()), 8)
    pyramid = DECODER.decoder.replace(experts_per_layer=(8, 16))
    with pytest.raises(UserError, match=r"decoder\.experts_per_layer"):
        with_experts(DECODER.replace(decoder=pyramid, moe=MoE(experts=8)), 8)


def test_device_memory_is_what_is_not_on_the_host() -> None:
    memory = RankMemory(weights=1, gradients=2, optimizer=4, gathered=8, activations=16, host=3)
    assert memory.state == 7
    assert memory.device == 28
