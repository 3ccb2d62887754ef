"""Routing hooks: expert usage, router health and recorded routing of a run in progress."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.world import World
from moesaic.moe.router_context import TokenContext
from moesaic.moe.routing_record import LayerRoutes, RoutingRecord, routes_from_records
from moesaic.monitor.expert_usage import LogitStats, UsageCounter, summarize_load
from moesaic.monitor.health_record import (
    RecordedFinding,
    read_findings,
    record_findings,
    up_to_step,
    write_findings,
)
from moesaic.monitor.health_rules import HealthFinding
from moesaic.monitor.router_health import RouterHealthMonitor, summarize_health
from moesaic.train.random_state import preserve_random_state
from moesaic.train.router_layers import health_check_settings, routed_layers
from moesaic.train.run import Run
from moesaic.train.running_metrics import LossCategories
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook

PROBE_ROWS = 2  # per task and direction: enough tokens to compare two routers
_STEP_FILE = re.compile(r"step-(\d{8})(\.rank-\d+)?\.routes")


class RouterHealthHook(Hook):
    """Counts expert usage by label (language) and checks router health at every row of metrics.

    One step in ``log.routing_stats_every`` is counted. Counts since the last row, and those of the
    whole run (``usage.json``), are part of a checkpoint. Tokens of an encoder layer count for the
    source language, those of a decoder layer for the target language; where rows have no language,
    for another label (``LossCategories.routing_group``). ``findings`` is the file of the findings
    (``monitor/health_record.py``).
    """

    def __init__(self, path: Path, *, trainer: Trainer, findings: Path) -> None:
        self.path, self.findings_path = path, findings
        languages = trainer.objective.categories.routing_labels
        self._interval_counts = _new_counts(trainer, languages)
        self._run_counts = _new_counts(trainer, languages)
        self._empty_counts = _zero_counts(
            trainer.run, languages=len(languages), device=trainer.world.device
        )
        self._has_counts = False  # whether any rank counted a step since the last row
        self._health_check = RouterHealthMonitor(
            health_check_settings(trainer.run, languages=languages)
        )
        self._recorded: tuple[RecordedFinding, ...] = ()
        trainer.stateful_components["routes"] = self

    def before_run(self, trainer: Trainer) -> None:
        if trainer.world.rank == 0:
            recorded = read_findings(self.findings_path) if trainer.step else ()
            self._recorded = up_to_step(recorded, trainer.step)
            lasting = [r.finding for r in self._recorded if r.last_step is None]
            self._health_check.restore(lasting)
            write_findings(self.findings_path, self._recorded)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        log = trainer.run.log
        if report.step % log.routing_stats_every == 0:
            self._has_counts = bool(self._empty_counts)
            categories = trainer.objective.categories
            for record in report.result.records:
                labels = row_labels(record, batch=report.result.batch, categories=categories)
                self._count(record, labels=labels)
        if log.is_due(report.step, steps=trainer.run.steps) and self._has_counts:
            self._check_health(trainer)

    def after_run(self, trainer: Trainer) -> None:
        total = _new_counts(trainer, self._run_counts.languages)
        total.merge(dict(_sorted_by_layer(self._run_counts.tensors())))
        total.merge(self._global_counts(trainer.world))
        if trainer.world.rank == 0 and total.tensors():
            total.write(self.path)

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Return the counts of the interval and of the run, for a checkpoint. Collective."""
        new = {f"new/{name}": value for name, value in self._global_counts(world).items()}
        return new | {f"all/{name}": value for name, value in self._run_counts.tensors().items()}

    def restore(self, tensors: Mapping[str, Tensor], *, world: World) -> None:
        """Restore the counts; rank 0 alone takes those of the interval."""
        for counts, prefix, keep in (
            (self._interval_counts, "new/", world.rank == 0),
            (self._run_counts, "all/", True),
        ):
            named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            counts.reset()
            counts.merge({n: t.to(world.device) * int(keep) for n, t in _sorted_by_layer(named)})
        self._has_counts = any(name.startswith("new/") for name in tensors)

    def discard_attempt(self) -> None:
        """Nothing: what is counted are finished steps."""

    def _count(self, record: RoutingRecord, *, labels: Int[Tensor, "B"]) -> None:
        routing = record.routing
        self._interval_counts.add_edges(
            record.layer,
            expert=routing.expert,
            language=labels[record.row[routing.token]],
            num_experts=routing.num_experts,
            late=late_in_queue(record.context)[routing.token],
            logit_stats=LogitStats(record.router_entropy(), record.logit_rms()),
        )

    def _check_health(self, trainer: Trainer) -> None:
        interval = _new_counts(trainer, self._interval_counts.languages)
        interval.merge(self._global_counts(trainer.world))
        self._interval_counts.reset()
        self._has_counts = False
        self._run_counts.merge(dict(_sorted_by_layer(interval.tensors())))
        layers = interval.layers()
        findings = self._health_check.check_interval(layers)
        trainer.event_log.record_values(summarize_load(layers))
        trainer.event_log.router_health = summarize_health(findings)
        self._record_findings(trainer, findings)

    def _global_counts(self, world: World) -> dict[str, Tensor]:
        """Return the counts since the last row over all ranks; empty if there are none."""
        if not self._has_counts:
            return {}
        local = self._interval_counts.tensors()
        return {
            name: world.all_reduce(local.get(name, zeros))
            for name, zeros in self._empty_counts.items()
        }

    def _record_findings(self, trainer: Trainer, findings: tuple[HealthFinding, ...]) -> None:
        """Note what is new, and write the findings so far where the report reads them."""
        before = self._recorded
        self._recorded = record_findings(before, findings, step=trainer.step)
        for new in self._recorded[len(before) :]:
            trainer.event_log.add_note(f"step {trainer.step}: {new.finding.sentence}")
        if trainer.world.rank == 0 and self._recorded != before:
            write_findings(self.findings_path, self._recorded)


def row_labels(
    record: RoutingRecord, *, batch: Batch, categories: LossCategories
) -> Int[Tensor, "B"]:
    """Return each row's label for this layer: a language (source in an encoder), or another."""
    return categories.rows_for_routing(batch, side=record.layer.partition(".")[0])


def late_in_queue(context: TokenContext) -> Bool[Tensor, "T"]:
    """Return which tokens are in the later half of the order in which capacity is assigned."""
    order = context.position.argsort(stable=True)
    order = order[context.row_key[order].argsort(stable=True)]
    late = torch.zeros_like(order, dtype=torch.bool)
    late[order[(order.numel() + 1) // 2 :]] = True
    return late


def _new_counts(trainer: Trainer, languages: tuple[str, ...]) -> UsageCounter:
    layers = routed_layers(trainer.run.model)
    nulls = {layer.name: layer.moe.null_experts.count() for layer in layers}
    return UsageCounter(languages, null_experts=nulls)


def _zero_counts(run: Run, *, languages: int, device: torch.device) -> dict[str, Tensor]:
    """Return zero counts of every MoE layer; a rank of a pipeline holds only some layers."""
    counts: dict[str, Tensor] = {}
    for layer in routed_layers(run.model):
        experts = layer.moe.num_router_outputs
        edges = torch.zeros((experts + 1) * languages + 1, dtype=torch.long, device=device)
        counts[f"edges/{layer.name}"] = edges
        counts[f"scales/{layer.name}"] = torch.zeros(4, dtype=torch.float64, device=device)
    return counts


def _sorted_by_layer(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Sort names like ``edges/encoder.10``: encoder first, then by layer number."""
    return sorted(tensors.items(), key=lambda item: _layer_sort_key(item[0]))


def _layer_sort_key(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    parts = re.split(r"[/.]", name)
    return "decoder" in parts, [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


class RoutingTraceHook(Hook):
    """Writes the routing of one step in ``log.routing_trace_every`` to a routes file.

    It is the routing of the step's last micro-batch as it was used: with noise and with tokens
    dropped by capacity. Each rank writes its own rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before_run(self, trainer: Trainer) -> None:
        _delete_later_steps(self.folder, trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        every, records = trainer.run.log.routing_trace_every, report.result.records
        if not every or report.step % every or not records:
            return
        found: list[LayerRoutes] = []
        for record in records:
            labels = row_labels(
                record, batch=report.result.batch, categories=trainer.objective.categories
            )
            found += routes_from_records([record], language=labels)
        world = trainer.world
        rank = f".rank-{world.rank}" if world.size > 1 else ""
        _write_routing(self.folder / f"{_step_name(report.step)}{rank}.routes", trainer, [found])


class RoutingProbeHook(Hook):
    """Routes the same held-out rows every ``log.routing_probe_every`` steps and stores the routing.

    The report compares these files to show when routing converges.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before_run(self, trainer: Trainer) -> None:
        _delete_later_steps(self.folder, trainer)
        if not trainer.step:
            self._probe(trainer)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        every = trainer.run.log.routing_probe_every
        if every and (report.step % every == 0 or report.step == trainer.run.steps):
            self._probe(trainer)

    def _probe(self, trainer: Trainer) -> None:
        if not trainer.run.log.routing_probe_every or trainer.parallel_model.pipeline is not None:
            return  # no rank of a pipeline has every layer
        found = []
        trainer.model.eval()
        with torch.no_grad(), preserve_random_state(trainer.world.device):
            for held_out in trainer.held_out_batches(rows=PROBE_ROWS):
                batch = held_out.to(trainer.world.device)
                with trainer.objective.precision.autocast(batch.device):
                    records = trainer.model(batch).records  # on every rank: limits are collective
                if trainer.world.rank == 0:
                    labels = trainer.objective.categories.rows_for_routing(batch, side="decoder")
                    found.append(routes_from_records(records, language=labels))
        trainer.model.train()
        if trainer.world.rank == 0 and any(found):
            _write_routing(self.folder / f"{_step_name(trainer.step)}.routes", trainer, found)


def _write_routing(path: Path, trainer: Trainer, batches: Iterable[Sequence[LayerRoutes]]) -> None:
    languages = trainer.objective.categories.routing_labels
    about = {"run": trainer.run.name, "step": trainer.step}
    with RoutesWriter(path, languages=languages, about=about) as writer:
        for routes in batches:
            writer.add(routes)


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _delete_later_steps(folder: Path, trainer: Trainer) -> None:
    """Delete files of steps that a resumed run is going to repeat."""
    for path in folder.glob("step-*.routes") if trainer.world.rank == 0 else ():
        found = _STEP_FILE.fullmatch(path.name)
        if found and int(found[1]) > trainer.step:
            path.unlink()
