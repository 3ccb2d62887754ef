"""Streamed weights train to the same bits and are fetched as often as stated."""

from collections import defaultdict
from functools import partial
from itertools import chain

import pytest
import torch

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.distributed.world import ProcessGroupWorld, local_tensor
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.memory.tier import DiskStorage, HostMemory
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.moe.experts import LoRAExpert
from moesaic.moe.layer import moe_layers
from moesaic.optim.master_weights import StochasticRounding
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.optim.optimizer_state import live_state
from moesaic.parallel.activation_checkpointing import CheckpointBlocks, NoActivationCheckpointing
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert_dispatch import AdaptiveExperts, ChunkedAllToAll
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.pipeline_schedules import (
    BreadthFirst,
    DualPipeV,
    GPipe,
    Interleaved,
    InterleavedZeroBubble,
    OneForwardOneBackward,
    ZeroBubbleV,
)
from moesaic.parallel.precision import BFloat16
from moesaic.parallel.trainable_parameters import MatchingParameters
from moesaic.planner.cost_entries import DEVICE, DISK, HOST, Purpose
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.step_cost import step_cost
from moesaic.testing.tiny_models import BALANCED_TOP1, tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.trainer import Trainer

STEPS = 3
TIERS = {"host": HostMemory(), "disk": DiskStorage()}
RUN = tiny_run(model=tiny_model_config(layers=2), clip_norm=0.1)
# of many experts some have no token
FEW_ROWS = tiny_model_config(moe=BALANCED_TOP1.replace(experts=64), layers=2)
RUNS = {
    "adamw": RUN.replace(optimizer=AdamW(lr=0.01)),
    "few rows": RUN.replace(model=FEW_ROWS),
    "few rows, checkpointed": RUN.replace(
        model=FEW_ROWS, parallel=ParallelConfig(activation_checkpointing=CheckpointBlocks())
    ),
    "muon, accumulated": RUN.replace(optimizer=Muon(lr=0.01), gradient_accumulation_steps=2),
    "checkpointed": RUN.replace(
        parallel=ParallelConfig(activation_checkpointing=CheckpointBlocks())
    ),
}


def trained(run, *, memory, note=None):
    trainer = tiny_trainer(run.replace(parallel=run.parallel.replace(memory=memory)))
    for number, layer in enumerate(moe_layers(trainer.model)):
        if note is not None:
            layer.register_forward_hook(partial(note, number))
    losses = [trainer.train_step().result.sums.losses for _ in range(STEPS)]
    return trainer, losses


def streamed_bytes(trainer: Trainer, shares) -> int:
    """Return the bytes that a run fetches.

    ``shares`` are those of the experts with rows in each forward pass of each layer. Forward
    fetches all weights of blocks; backward nothing of the last block, which stays, and else dense
    ones and the experts with rows.
    """
    layers = [sum(p.nbytes for p in x.experts.parameters()) for x in moe_layers(trainer.model)]
    blocks = [*trainer.model.encoder, *trainer.model.decoder]
    dense = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    passes, whole = len(shares[len(layers) - 1]), sum(dense)
    dense = [size - sum(_experts_of(block)) for size, block in zip(dense, blocks, strict=True)]
    backward = sum(size * sum(shares[n]) for n, size in enumerate(layers[:-1]))
    return round(passes * (whole + sum(dense[:-1])) + backward)


def _experts_of(block) -> list[int]:
    return [p.nbytes for layer in moe_layers(block) for p in layer.experts.parameters()]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", RUNS)
def test_streamed_training_equals_resident_training_bit_for_bit(name, tier):
    run, shares = RUNS[name], defaultdict(list)

    def note(number, layer, _inputs, output):
        used = output.record.routing.expert.unique()
        experts = layer.router.config.experts
        shares[number].append(int((used < experts).sum()) / experts)

    resident, losses = trained(run, memory=MemoryPlan(), note=note)
    streamed, others = trained(run, memory=MemoryPlan(parameters=TIERS[tier]))
    for a, b in zip(losses, others, strict=True):
        assert torch.equal(a, b)
    theirs = dict(streamed.model.named_parameters())
    for parameter_name, parameter in resident.model.named_parameters():
        assert torch.equal(parameter, theirs[parameter_name]), parameter_name
    stream = streamed.parallel_model.parameter_stream
    assert stream is not None
    if isinstance(run.parallel.activation_checkpointing, NoActivationCheckpointing):
        assert stream.store.moved.fetched == streamed_bytes(streamed, shares)
        assert any(share < 1 for share in chain(*shares.values())) == (name == "few rows")


def _on_two_ranks(dispatch, memory):
    """Train on two ranks that share experts; return weights, bytes fetched and expected."""
    plan = ParallelPlan(expert=2)
    parallel = ParallelConfig(plan=plan, dispatch=dispatch, memory=memory)
    trainer = tiny_trainer(RUNS["few rows"].replace(parallel=parallel), world=ProcessGroupWorld())
    shares, used = defaultdict(list), defaultdict(set)

    def note(number, rows_per_expert):
        used[number] |= set(rows_per_expert.nonzero().flatten().tolist())

    def note_pass(number, layer, *_):
        shares[number].append(len(used.pop(number, ())) / layer.experts.up.shape[0])

    for number, layer in enumerate(moe_layers(trainer.model)):
        layer.experts.call_before_use(partial(note, number))
        layer.register_forward_hook(partial(note_pass, number))
    for _ in range(STEPS):
        trainer.train_step()
    live_state(trainer.optimizer)  # the last updates of experts that are late
    stream, expected = trainer.parallel_model.parameter_stream, 0
    if stream is not None:
        expected = streamed_bytes(trainer, shares)
        assert min(chain(*shares.values())) < 1
    fetched = stream.store.moved.fetched if stream is not None else 0
    return [p.detach().clone() for p in trainer.model.parameters()], fetched, expected


@pytest.mark.parametrize("dispatch", [ChunkedAllToAll(), AdaptiveExperts(weight_byte_s=0)])
def test_a_dispatch_fetches_used_experts_for_backward_and_trains_to_the_same_bits(dispatch):
    host = HostMemory()
    late = MemoryPlan(parameters=host, optimizer_states=host, late_steps=8)
    ranks = (run_on_ranks(2, _on_two_ranks, dispatch, memory) for memory in (MemoryPlan(), late))
    for resident, streamed in zip(*ranks, strict=True):
        assert all(map(torch.equal, resident[0], streamed[0]))
        assert streamed[1] == streamed[2] > 0


def test_between_steps_no_streamed_weight_is_on_the_device():
    trainer, _ = trained(RUNS["adamw"], memory=MemoryPlan(parameters=HostMemory()))
    stream = trainer.parallel_model.parameter_stream
    assert stream is not None
    parameters = dict(trainer.model.named_parameters())
    for name in stream.names:
        assert parameters[name].data_ptr() == stream.store.live(name).data_ptr()
    assert stream.device_bytes == 0


LORA_EXPERTS = tiny_model_config(moe=BALANCED_TOP1.replace(expert=LoRAExpert(rank=2)), layers=2)
TIERED_RUNS = {
    "ZeRO": ({"zero": 3, "expert": 2}, {}),
    "ZeRO, weights that experts share": ({"zero": 3, "expert": 2}, {"model": LORA_EXPERTS}),
    "weights that experts share": ({}, {"model": LORA_EXPERTS}),
    "adapters": ({}, {"trainable": LoRA()}),
    "only the last norm": ({}, {"trainable": MatchingParameters(patterns=("decoder_norm*",))}),
    "Muon": ({}, {"optimizer": Muon()}),
    "float32 masters": ({}, {"precision": BFloat16()}),
    "rounded at random": ({}, {"precision": BFloat16(master=StochasticRounding())}),
    "checkpointed": ({}, {"checkpointing": CheckpointBlocks()}),
}
DEEP = tiny_model_config(layers=3)
PIPELINES = {
    "GPipe": {"schedule": GPipe()},
    "1F1B": {},
    "1F1B, checkpointed": {"checkpointing": CheckpointBlocks()},
    "interleaved": {"schedule": Interleaved()},
    "breadth first": {"schedule": BreadthFirst(), "gradient_accumulation_steps": 3},
    "zero bubble": {"schedule": InterleavedZeroBubble()},
    "ZBV": {"schedule": ZeroBubbleV(), "gradient_accumulation_steps": 5},
    "ZBV, checkpointed": {"schedule": ZeroBubbleV(), "checkpointing": CheckpointBlocks()},
    "DualPipeV": {"schedule": DualPipeV()},
}


def _on_tiers(name):
    degrees, changes = TIERED_RUNS.get(name) or ({"pipe": 2}, {"model": DEEP, **PIPELINES[name]})
    memory = MemoryPlan(parameters=DiskStorage(), optimizer_states=HostMemory())
    parallel = ParallelConfig(
        plan=ParallelPlan(**degrees),
        memory=memory,
        pipeline_schedule=changes.get("schedule", OneForwardOneBackward()),
        activation_checkpointing=changes.get("checkpointing", NoActivationCheckpointing()),
    )
    steps = 4 if degrees.get("pipe") else 2
    run = RUN.replace(parallel=parallel, gradient_accumulation_steps=steps)
    own = {"schedule", "checkpointing"}
    return run.replace(**{key: value for key, value in changes.items() if key not in own})


def _weight_bytes(name):
    """Return the bytes of weights in a step: on the device, on the tier, and those that move."""
    trainer = tiny_trainer(_on_tiers(name), world=ProcessGroupWorld())
    trainer.train_step()
    stream, updated = trainer.parallel_model.parameter_stream, trainer.optimizer.updated_weights
    assert stream is not None
    names, parameters = {*stream.names}, trainer.model.named_parameters()
    resident = sum(local_tensor(p).nbytes for name, p in parameters if name not in names)
    assert not stream.in_use
    held = [resident + stream.peak_device_bytes, stream.store.num_bytes]
    counts = (updated.moved, updated.moved_at_rest)
    moved = (n for each in counts for n in (each.fetched, each.written))
    return held, stream.store.moved.fetched, list(moved)


@pytest.mark.parametrize("name", [*TIERED_RUNS, *PIPELINES])
def test_streamed_weights_take_the_bytes_of_the_forecast(name):
    run, weights = _on_tiers(name), Purpose.WEIGHTS
    settings = CostSettings(
        model=run.model,
        parallel=run.parallel,
        optimizer=run.optimizer,
        sizes=BatchDims(rows=1, source=4, target=4),
        micro_batches=run.gradient_accumulation_steps,
        world=2,
        device="cpu",
        trainable=run.trainable,
        precision=run.precision,
    )
    for rank, (held, fetched, updated) in enumerate(run_on_ranks(2, _weight_bytes, name)):
        cost = step_cost(settings, rank=rank)
        assert held == [cost.held_bytes(tier=t, purpose=weights) for t in (DEVICE, DISK)]
        moved = defaultdict(int)
        for each in cost.moved:
            moved[each.source, each.target] += each.bytes * (each.purpose == weights)
        assert updated[:2] == [moved[DEVICE, HOST], moved[HOST, DEVICE]]
        # what rests on disk is updated on the host, but for matrices of Muon on the device
        assert fetched + updated[2] == moved[DISK, HOST] + moved[DISK, DEVICE]
        assert updated[3] == moved[HOST, DISK] + moved[DEVICE, DISK]
        if not isinstance(run.optimizer, Muon):
            assert fetched == moved[DISK, DEVICE]


SPLIT = InterleavedZeroBubble(), ZeroBubbleV(), DualPipeV()


def _streamed_stages_equal_resident_ones():
    """Return, for each schedule that splits backward passes, whether the weights are equal."""
    plans, equal = (MemoryPlan(), MemoryPlan(parameters=HostMemory(), gradients=HostMemory())), []
    for schedule in SPLIT:
        parallel = ParallelConfig(plan=ParallelPlan(pipe=2), pipeline_schedule=schedule)
        runs = [
            RUN.replace(
                model=DEEP, parallel=parallel.replace(memory=each), gradient_accumulation_steps=4
            )
            for each in plans
        ]
        trainers = [tiny_trainer(run, world=ProcessGroupWorld()) for run in runs]
        for trainer in trainers:
            trainer.train_step()
            trainer.train_step()
        weights = (trainer.model.parameters() for trainer in trainers)
        equal.append(all(map(torch.equal, *weights)))
    return equal


def test_whole_backward_passes_of_streamed_stages_train_to_the_bits_of_split_ones():
    assert run_on_ranks(2, _streamed_stages_equal_resident_ones) == [[True] * len(SPLIT)] * 2


@pytest.mark.parametrize("tier", TIERS)
def test_offloaded_activations_train_to_the_same_bits(tier):
    run = RUNS["adamw"].replace(model=RUN.model.replace(dim=64, dropout=0.1))
    resident, losses = trained(run, memory=MemoryPlan())
    offloaded, others = trained(run, memory=MemoryPlan(activations=TIERS[tier]))
    for a, b in zip(losses, others, strict=True):
        assert torch.equal(a, b)
    theirs = dict(offloaded.model.named_parameters())
    for parameter_name, parameter in resident.model.named_parameters():
        assert torch.equal(parameter, theirs[parameter_name]), parameter_name
    moved = offloaded.model.run_block.store.moved
    assert moved.written
    assert moved.fetched >= moved.written
