"""Follow: make training steps with the trainer itself, and keep what each of them left.

Letters: E experts.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as distributed

from moesaic.core.shapes import Tensor
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.model.transformer import Transformer
from moesaic.moe.layer import moe_layers
from moesaic.moe.routing_record import RoutingRecord
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.sharding_plan import write_shard
from moesaic.train.random_state import seed_rank
from moesaic.train.run import Run
from moesaic.train.trainer import Trainer
from moesaic.verify.synthetic_batches import SyntheticShape, UnevenBatches

NamedTensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """What is known of a model without its numbers: shapes of parameters, edges per layer."""

    shapes: dict[str, tuple[int, ...]]
    experts: dict[str, int]


@dataclass(frozen=True, slots=True)
class TrainingTrace:
    """What steps left, whole, as every rank sees it.

    ``rows`` are the trainer's own metrics of each step, ``gradients`` what the optimizer was given,
    ``edges`` how many led to each expert of a layer in each step's last micro-batch (those dropped
    come last), ``weights`` what was there before the first step and after each. ``apart`` is the
    greatest difference between copies of one value, of weights or gradients, and where.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[NamedTensors] = field(default_factory=list)
    expert_counts: list[NamedTensors] = field(default_factory=list)
    weights: list[NamedTensors] = field(default_factory=list)
    replica_differences: list[tuple[float, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def model_shapes(run: Run) -> ModelShapes:
    """Return what is known of a run's model before it is built."""
    with torch.device("meta"):
        model = Transformer(run.model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return ModelShapes(
        shapes,
        {layer.name: layer.router.config.num_router_outputs + 1 for layer in moe_layers(model)},
    )


def record_run(
    run: Run, *, parallel: ParallelConfig, shape: SyntheticShape, steps: int, model: ModelShapes
) -> TrainingTrace:
    """Train from the run's seed under a plan, on this rank of those there are. Collective."""
    world: World = ProcessGroupWorld() if distributed.is_initialized() else SingleProcess()
    trainer = _build_trainer(run.replace(parallel=parallel), shape=shape, world=world)
    trace = TrainingTrace()

    def before_update(*_: object) -> None:
        given = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        found, apart = gather_full_tensors(
            given, spread=trainer.parallel_model, shapes=model.shapes
        )
        trace.gradients.append(found)
        trace.replica_differences.append(apart)

    trainer.optimizer.register_step_pre_hook(before_update)
    _record_weights(trace, trainer=trainer, model=model)
    for _ in range(steps):
        began = time.perf_counter()
        report = trainer.train_step()
        trace.seconds.append(time.perf_counter() - began)
        trace.metrics.append(trainer.metrics.compute_and_reset(world))
        trace.expert_counts.append(
            _expert_counts(report.result.records, experts=model.experts, world=world)
        )
        _record_weights(trace, trainer=trainer, model=model)
    return trace


def _build_trainer(run: Run, *, shape: SyntheticShape, world: World) -> Trainer:
    torch.manual_seed(run.seed)
    model = Transformer(run.model)
    seed_rank(run.seed, world=world)
    part, parts = run.parallel.plan.resolve(world.size).data_shard(world.rank)
    data = UnevenBatches(shape, seed=run.seed, shard=part, num_shards=parts)
    return Trainer(run, model=model, data=data, world=world)


def _record_weights(trace: TrainingTrace, *, trainer: Trainer, model: ModelShapes) -> None:
    held = dict(trainer.model.named_parameters())
    found, apart = gather_full_tensors(held, spread=trainer.parallel_model, shapes=model.shapes)
    trace.weights.append(found)
    trace.replica_differences.append(apart)


def _expert_counts(
    records: Sequence[RoutingRecord], *, experts: Mapping[str, int], world: World
) -> NamedTensors:
    counts = {name: torch.zeros(number, dtype=torch.int64) for name, number in experts.items()}
    for record in records:
        counts[record.layer] += torch.bincount(
            record.routing.expert, minlength=experts[record.layer]
        )
    return {name: world.all_reduce(count) for name, count in counts.items()}


def gather_full_tensors(
    held: Mapping[str, Tensor], *, spread: ParallelModel, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[NamedTensors, tuple[float, str]]:
    """Return whole tensors of what the ranks hold, and by how much copies differ. Collective.

    What no rank holds is NaN, so that it equals nothing.
    """
    low, high = ({name: torch.full(s, x) for name, s in shapes.items()} for x in (_INF, -_INF))
    for name, shard in spread.shards(held).items():
        write_shard(low[name], shard)
        write_shard(high[name], shard)
    if distributed.is_initialized():
        low = _all_reduce_flat(low, distributed.ReduceOp.MIN)
        high = _all_reduce_flat(high, distributed.ReduceOp.MAX)
    for name in shapes:
        high[name][low[name] > high[name]] = torch.nan
    between = {n: float((high[n] - low[n]).max()) for n in shapes if high[n].numel()}
    widest = max(between, key=lambda name: between[name])
    return high, (between[widest], widest)


_INF = float("inf")


def _all_reduce_flat(
    tensors: NamedTensors, operation: distributed.ReduceOp.RedOpType
) -> NamedTensors:
    """Reduce all tensors over all ranks as one."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    distributed.all_reduce(flat, op=operation)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }
