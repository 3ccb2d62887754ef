"""Record a training run: metrics, gradients, expert counts and weights of every step, unsharded."""

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
from moesaic.train.loop import training_loop
from moesaic.train.run import Run
from moesaic.train.run_training import seeded_trainer
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook
from moesaic.verify.synthetic_batches import SyntheticShape, UnevenBatches

NamedTensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The shapes of a model's parameters, and the number of experts of each MoE layer plus one."""

    shapes: dict[str, tuple[int, ...]]
    experts: dict[str, int]


@dataclass(frozen=True, slots=True)
class TrainingTrace:
    """What a run did in each step, as unsharded tensors, the same on every rank.

    ``metrics`` are the trainer's own, ``gradients`` the input of the optimizer, ``expert_counts``
    the tokens of each expert of a layer in the step's last micro-batch (dropped ones last),
    ``weights`` those before the first step and after each. ``replica_differences`` is the greatest
    difference between replicas of a weight or gradient, and its name.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[NamedTensors] = field(default_factory=list)
    expert_counts: list[NamedTensors] = field(default_factory=list)
    weights: list[NamedTensors] = field(default_factory=list)
    replica_differences: list[tuple[float, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def model_shapes(run: Run) -> ModelShapes:
    """Return the shapes of a run's model without allocating it."""
    with torch.device("meta"):
        model = Transformer(run.model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    experts = {x.name: x.router.config.num_router_outputs + 1 for x in moe_layers(model)}
    return ModelShapes(shapes, experts)


def record_run(
    run: Run, *, parallel: ParallelConfig, shape: SyntheticShape, steps: int, model: ModelShapes
) -> TrainingTrace:
    """Train ``steps`` steps from the run's seed under a plan, on this rank. Collective."""
    world: World = ProcessGroupWorld() if distributed.is_initialized() else SingleProcess()
    run = run.replace(parallel=parallel)
    trainer = seeded_trainer(
        run,
        make_loader=lambda replica: UnevenBatches(
            shape, seed=run.seed, shard=replica.rank, num_shards=replica.num_replicas
        ),
        world=world,
    )
    recorder = _Recorder(model)
    training_loop(trainer, hooks=[recorder], until=steps)
    return recorder.trace


class _Recorder(Hook):
    """Records the trace of a run."""

    def __init__(self, model: ModelShapes) -> None:
        self.trace = TrainingTrace()
        self._model = model

    def before_run(self, trainer: Trainer) -> None:
        def record_gradients(*_: object) -> None:
            gradients = dict(trainer.parallel_model.named_gradients())
            self.trace.gradients.append(self._unshard(gradients, trainer=trainer))

        trainer.optimizer.register_step_pre_hook(record_gradients)
        self._record_weights(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.trace.seconds.append(report.seconds)
        self.trace.metrics.append(trainer.metrics.compute_and_reset(trainer.world))
        self.trace.expert_counts.append(
            _expert_counts(report.result.records, experts=self._model.experts, world=trainer.world)
        )
        self._record_weights(trainer)

    def _record_weights(self, trainer: Trainer) -> None:
        parameters = dict(trainer.model.named_parameters())
        self.trace.weights.append(self._unshard(parameters, trainer=trainer))

    def _unshard(self, tensors: Mapping[str, Tensor], *, trainer: Trainer) -> NamedTensors:
        full, difference = gather_full_tensors(
            tensors, parallel_model=trainer.parallel_model, shapes=self._model.shapes
        )
        self.trace.replica_differences.append(difference)
        return full


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
    tensors: Mapping[str, Tensor],
    *,
    parallel_model: ParallelModel,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[NamedTensors, tuple[float, str]]:
    """Return unsharded tensors, and the greatest difference between replicas. Collective.

    Elements that no rank holds are NaN, which equals nothing.
    """
    inf = float("inf")
    low, high = ({name: torch.full(s, x) for name, s in shapes.items()} for x in (inf, -inf))
    for name, shard in parallel_model.shards(tensors).items():
        write_shard(low[name], shard)
        write_shard(high[name], shard)
    if distributed.is_initialized():
        low = _all_reduce_flat(low, distributed.ReduceOp.MIN)
        high = _all_reduce_flat(high, distributed.ReduceOp.MAX)
    for name in shapes:
        high[name][low[name] > high[name]] = torch.nan
    differences = {n: float((high[n] - low[n]).max()) for n in shapes if high[n].numel()}
    widest = max(differences, key=lambda name: differences[name])
    return high, (differences[widest], widest)


def _all_reduce_flat(
    tensors: NamedTensors, operation: distributed.ReduceOp.RedOpType
) -> NamedTensors:
    """Reduce all tensors over all ranks in one all-reduce."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    distributed.all_reduce(flat, op=operation)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }
