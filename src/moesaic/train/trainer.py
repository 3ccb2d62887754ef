"""Trainer: model, optimizer, data and counters of a run in progress; ``train_step`` advances it.

``snapshot()`` holds everything that decides the next step: weights, optimizer state, loader state,
random number generators, running sums and batches to retry. After ``restore()`` of it, training
continues bit for bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moesaic.checkpoint.sharded_checkpoint import verify_on_all_ranks
from moesaic.checkpoint.snapshot import RankSnapshot, Snapshot
from moesaic.core.config_upgrade import upgrade_config
from moesaic.core.errors import CheckpointError, UserError
from moesaic.core.shapes import Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.flight_recorder import FLIGHT_RECORDER, mark_phase
from moesaic.distributed.world import World
from moesaic.memory.disk_store import DiskFullError
from moesaic.model.transformer import Transformer
from moesaic.model.weights import restore_tensors
from moesaic.moe.layer import reset_routing_stats, update_stateful_rules
from moesaic.nn.fused_projections import fused_outputs
from moesaic.optim.gradient_clipping import GradNorm
from moesaic.optim.optimizer_state import (
    frozen_names,
    frozen_state,
    masters_of,
    restore_state,
    state_blocks,
    without_masters,
)
from moesaic.parallel.matrix_owners import MatrixOwners
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.state_blocks import check_state_blocks
from moesaic.parallel.trainable_parameters import freeze_others
from moesaic.train.bad_steps import LossHistory, RetryQueue, StepAttempt
from moesaic.train.memory_tiers import use_memory_plan
from moesaic.train.random_state import random_state, restore_random_state
from moesaic.train.run import Run
from moesaic.train.running_metrics import EventLog, LossCategories, RunningMetrics
from moesaic.train.sharded_state import local_shards, restore_shards
from moesaic.train.step import ForwardBackwardResult, Objective, first_non_finite
from moesaic.train.training_data import BatchLoader

FillShards = Callable[[ParallelModel], None]
# Names that parts of a checkpoint had earlier, by their present names.
PREVIOUS_NAMES = {"metrics": "meters", "events": "journal"}


class StatefulComponent(Protocol):
    """Running sums that are saved in checkpoints (hooks register theirs before ``restore``)."""

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Return the sums over all ranks. Collective."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], *, world: World) -> None: ...

    def discard_attempt(self) -> None:
        """Leave out what was added by an attempt at a step that is skipped."""
        ...


class NonFiniteError(UserError):
    """More than ``max_bad_steps`` consecutive steps had a non-finite loss or gradient."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished update: its number (from 1), its results, and where the time went.

    ``seconds`` is the total, ``data_seconds`` loading batches, ``collective_seconds`` waiting in
    collectives on this rank. ``rolled_back``: its norm has undone updates that had run ahead.
    """

    step: int
    result: ForwardBackwardResult
    lr: float
    seconds: float
    data_seconds: float
    collective_seconds: float = 0.0
    rolled_back: bool = False


class Trainer:
    """Training state of one rank (see the module's first lines)."""

    def __init__(
        self,
        run: Run,
        *,
        model: Transformer,
        data: BatchLoader,
        world: World,
        fill: FillShards | None = None,
    ) -> None:
        """``fill`` gives values to the shards of a model without any; None: it has values."""
        self.run, self.world, self.data = run, world, data
        self.model = model
        run.trainable.attach(model)
        fused = fused_outputs(model)  # of the whole model, before it is sharded
        check_state_blocks(
            model,
            optimizer=run.optimizer,
            trainable=run.trainable,
            plan=run.parallel.plan.resolve(world.size),
        )
        self.parallel_model = parallelize(
            model,
            parallel=run.parallel,
            world=world,
            precision=run.precision,
            timeout_s=run.collective_timeout_s,
        )
        if fill is not None:
            fill(self.parallel_model)
        freeze_others(self.parallel_model, trainable=run.trainable, world=world)
        self.optimizer = run.optimizer.build(
            model.named_parameters(),
            kinds=model.parameter_kinds(),
            master_weights=run.precision.master_weights,
        )
        self.optimizer.fused_outputs = fused
        self.run_ahead = use_memory_plan(
            run.parallel.memory, optimizer=self.optimizer, model=self.parallel_model
        )
        self.optimizer.position_of = self.parallel_model.position_of
        if world.size > 1:
            self.optimizer.matrix_sharding = MatrixOwners(self.parallel_model)
        categories = LossCategories.of(data.labels)
        self.objective = Objective(categories, run.precision)
        self.metrics = self.new_metrics()
        self.stateful_components: dict[str, StatefulComponent] = {"metrics": self.metrics}
        self.retry_queue = RetryQueue()
        self.loss_history = LossHistory()
        self.step = 0
        self.event_log = EventLog()

    def train_step(self) -> StepReport:
        """Update the weights once, skipping non-finite steps and loss spikes. Collective.

        Raises NonFiniteError after ``max_bad_steps`` skipped steps in a row, and DiskFullError if a
        memory tier has no room for an update; the state is then that of the last good step, with
        the bad batches in the retry queue.
        """
        started, data_s = time.perf_counter(), 0.0
        collective_s = FLIGHT_RECORDER.collective_s
        while True:
            attempt = self.retry_queue.next_attempt(self.data.state())
            data_started = time.perf_counter()
            mark_phase("data", step=self.step + 1)
            batches = self._next_micro_batches(attempt)
            data_s += time.perf_counter() - data_started
            mark_phase("forward and backward")
            self._set_learning_rates()  # updates may run ahead
            result = self.objective.forward_backward(self.parallel_model, batches=batches)
            norm = self._clip_gradients()
            if self._should_update(attempt, result=result, norm=norm):
                break
        mark_phase("update")
        self._reserve_states(attempt)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.run_ahead.forget()
        update_stateful_rules(self.model)
        self.retry_queue.mark_succeeded()
        self.metrics.add_step(result.sums, norm=norm.norm)
        self.step += 1
        return StepReport(
            self.step,
            result,
            lr=max(group["lr"] for group in self.optimizer.param_groups),
            seconds=time.perf_counter() - started,
            data_seconds=data_s,
            collective_seconds=FLIGHT_RECORDER.collective_s - collective_s,
            rolled_back=self.run_ahead.num_bytes > 0 and norm.factor != 1,
        )

    def _set_learning_rates(self) -> None:
        scheduled = self.run.schedule.lr_factor(self.step, steps=self.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (scheduled * self.loss_history.rate)

    def _clip_gradients(self) -> GradNorm:
        self.run_ahead.stop()
        norm = self.parallel_model.clip_gradients(self.run.clip_norm)
        if norm.factor != 1:
            self.run_ahead.roll_back()
        return norm

    def new_metrics(self) -> RunningMetrics:
        """Return empty sums of the head's loss and metrics."""
        values = ("loss", *self.model.config.head.metric_names)
        return RunningMetrics(self.objective.categories, device=self.world.device, values=values)

    def held_out_batches(self, *, rows: int | None) -> Iterator[Batch]:
        """Yield this rank's part of the validation split, as the head is trained on it."""
        for batch in self.data.held_out_batches("valid", rows=rows):
            yield self._training_batch(batch)

    def _training_batch(self, batch: Batch) -> Batch:
        return self.model.config.head.training_batch(batch)

    def _next_micro_batches(self, attempt: StepAttempt) -> tuple[Batch, ...]:
        """Return the step's micro-batches; a retry loads them again from the saved loader state."""
        count = range(self.run.gradient_accumulation_steps)
        if not attempt.is_retry:
            return tuple(self._training_batch(next(self.data)) for _ in count)
        current = self.data.state()
        self.data.restore(attempt.loader_state)
        batches = tuple(self._training_batch(next(self.data)) for _ in count)
        self.data.restore(current)
        return batches

    def _should_update(
        self, attempt: StepAttempt, *, result: ForwardBackwardResult, norm: GradNorm
    ) -> bool:
        """Whether to update; otherwise the step is skipped. The same on every rank."""
        if not norm.finite:
            reason = self._describe_non_finite(result)
            self._skip_update(attempt, reason=reason)
            self._raise_if_persistent(reason)
            return False
        if not self.run.spikes.needs_loss:
            return True
        decision = self.run.spikes.decide(self._global_loss(result), history=self.loss_history)
        self.loss_history = decision.history
        if decision.skip:
            self._skip_update(attempt, reason=decision.note)
        return not decision.skip

    def _reserve_states(self, attempt: StepAttempt) -> None:
        """Raise DiskFullError on every rank, before any update, if the tier of one is full."""
        if self.optimizer.tier is None:
            return
        problem = ""
        try:
            self.optimizer.reserve()
        except DiskFullError as error:
            problem = str(error)
        if self.world.any_rank(bool(problem)):
            self._skip_update(attempt, reason=problem or "the disk of another rank is full")
            raise DiskFullError(problem or "another rank has no room on the disk of a memory tier")

    def _skip_update(self, attempt: StepAttempt, *, reason: str) -> None:
        """Discard the gradients, queue the batch for a retry, and note the reason."""
        self.run_ahead.roll_back()
        self.optimizer.zero_grad()
        reset_routing_stats(self.model)
        self.retry_queue.mark_failed(attempt)
        for component in self.stateful_components.values():
            component.discard_attempt()
        outcome = "given up after its second try" if attempt.is_retry else "queued for one retry"
        self.event_log.add_note(f"step {self.step + 1} skipped: {reason}; its batch is {outcome}")

    def _raise_if_persistent(self, reason: str) -> None:
        if self.retry_queue.consecutive_failures >= self.run.max_bad_steps:
            raise NonFiniteError(
                f"{self.retry_queue.consecutive_failures} steps in a row were skipped after step "
                f"{self.step} (max_bad_steps is {self.run.max_bad_steps}), the last for {reason}. "
                "Try a lower optimizer.lr, a longer schedule.warmup or a smaller clip_norm"
            )

    def _global_loss(self, result: ForwardBackwardResult) -> float:
        """Return the step's loss per prediction, over all ranks. Collective."""
        whole = self.objective.categories.partition
        total, count = self.world.all_reduce(result.sums.losses)[:, whole].sum(1).tolist()
        return total / max(count, 1.0)

    def _describe_non_finite(self, result: ForwardBackwardResult) -> str:
        losses = self.world.all_reduce(result.sums.losses)[0].tolist()
        terms = self.world.all_reduce_floats({n: float(v) for n, v in result.sums.terms.items()})
        named = [*zip(self.objective.categories.names, losses, strict=True), *terms.items()]
        losses = [name for name, value in named if not math.isfinite(value)]
        first = first_non_finite(self.parallel_model.named_gradients())
        where = f"the gradient of {first}" if first else "the norm of the gradients (it overflows)"
        return f"the loss of {', '.join(losses)} and {where}" if losses else where

    def snapshot(self) -> Snapshot | RankSnapshot:
        """Return everything that decides the next step, or this rank's shard of it. Collective.

        Where every rank holds every parameter, it is a full snapshot that rank 0 alone writes.
        """
        files = {"random": random_state(self.world)}
        files |= {n: part.tensors(self.world) for n, part in self.stateful_components.items()}
        about: dict[str, Any] = {
            "expert_parameters": self.parallel_model.expert_parameters,
            "plan": self.parallel_model.mesh.plan.to_dict(),
        }
        state, optimizer_state = self._json_state(), frozen_state(self.optimizer)
        if not self.parallel_model.is_replicated:
            blocks = state_blocks(self.optimizer)
            shards = local_shards(self.parallel_model, optimizer_state, blocks=blocks)
            about["frozen"] = frozen_names(self.optimizer)
            return RankSnapshot(self.step, shards | files, state, **about)
        files["model"] = self.parallel_model.saved_weights() | masters_of(optimizer_state)
        files["optimizer"] = without_masters(optimizer_state)
        return Snapshot(self.step, files, state, **about)

    def _json_state(self) -> dict[str, Any]:
        return {
            "config": self.run.to_dict(),
            "data": self.data.state(),
            "retry": self.retry_queue.pending,
            "spikes": self.loss_history.to_dict(),
            "events": self.event_log.state(),
        }

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint saved under any parallel plan. Raises CheckpointError."""
        verify_on_all_ranks(path, world=self.world)
        self.load_verified_checkpoint(path)

    def load_verified_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint whose files have been hashed. Raises CheckpointError."""
        remaining = restore_shards(
            path, parallel_model=self.parallel_model, optimizer=self.optimizer, world=self.world
        )
        self._restore_host_state(remaining)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a full snapshot (every rank holds every parameter)."""
        restore_tensors(self.parallel_model.saved_weights(), snapshot.files["model"])
        restore_state(self.optimizer, snapshot.files["optimizer"], weights=snapshot.files["model"])
        self._restore_host_state(snapshot)

    def _restore_host_state(self, snapshot: Snapshot) -> None:
        restore_random_state(
            snapshot.files["random"], world=self.world, seed=self.run.seed, step=snapshot.step
        )
        files, state = snapshot.files, snapshot.state
        for name, part in self.stateful_components.items():
            tensors = files.get(name) or files.get(PREVIOUS_NAMES.get(name, name), {})
            part.restore(tensors, world=self.world)
        if not isinstance(state["retry"], list):
            raise CheckpointError("its retries are no list of data positions")
        loader_states = [state["data"], *state["retry"]]
        _, renamed = upgrade_config(state["config"])
        if renamed:  # an earlier version hashed the old names of the config
            current = {"fingerprint": self.data.state()["fingerprint"]}
            loader_states = [saved | current for saved in loader_states]
        for saved in reversed(loader_states):  # each is checked; the last one stays
            self.data.restore(saved)
        self.retry_queue = RetryQueue(loader_states[1:])
        self.loss_history = LossHistory.from_dict(
            state.get("spikes", {})
        )  # absent in earlier checkpoints
        self.event_log.restore(state.get("events") or state[PREVIOUS_NAMES["events"]])
        self.step = self.optimizer.steps_taken = snapshot.step
