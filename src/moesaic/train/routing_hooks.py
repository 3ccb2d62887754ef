"""Routing hooks: expert usage, router health and recorded routing of a run in progress."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from moesaic.checkpoint.routes_file import RoutesWriter
from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.data.batch import Batch
from moesaic.distributed.world import World
from moesaic.moe.auxiliary_losses import RouterZLoss
from moesaic.moe.config import MoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.router_context import TokenContext
from moesaic.moe.routing_record import LayerRoutes, RoutingRecord, routes_from_records
from moesaic.monitor.expert_usage import LogitStats, UsageCounter, summarize_load
from moesaic.monitor.health_rules import HealthFinding, RouterSettings
from moesaic.monitor.router_health import RouterHealthMonitor, summarize_health
from moesaic.train.random_state import preserve_random_state
from moesaic.train.run import Run
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook

PROBE_ROWS = 2  # per task and direction: enough tokens to compare two routers
_STEP_FILE = re.compile(r"step-(\d{8})(\.rank-\d+)?\.routes")


class RouterHealthHook(Hook):
    """Counts expert usage by language and checks router health at every row of metrics.

    One step in ``log.routing_stats_every`` is counted. Counts since the last row, and those of the
    whole run (``usage.json``), are part of a checkpoint. Tokens of an encoder layer count for the
    source language, those of a decoder layer for the target language.
    """

    def __init__(self, path: Path, *, trainer: Trainer) -> None:
        self.path = path
        languages = trainer.objective.categories.languages
        self._interval_counts = _new_counts(trainer, languages)
        self._run_counts = _new_counts(trainer, languages)
        self._empty_counts = _zero_counts(
            trainer.run, languages=len(languages), device=trainer.world.device
        )
        self._has_counts = False  # whether any rank counted a step since the last row
        self._health_check = RouterHealthMonitor(
            health_check_settings(trainer.run, languages=languages)
        )
        self._reported: set[tuple[str, str]] = set()
        trainer.stateful_components["routes"] = self

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        log = trainer.run.log
        if report.step % log.routing_stats_every == 0:
            self._has_counts = bool(self._empty_counts)
            for record in report.result.records:
                self._count(record, batch=report.result.batch)
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

    def _count(self, record: RoutingRecord, *, batch: Batch) -> None:
        routing = record.routing
        languages = row_languages(record, batch=batch)
        self._interval_counts.add_edges(
            record.layer,
            expert=routing.expert,
            language=languages[record.row[routing.token]],
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
        self._note_new_findings(trainer, findings)

    def _global_counts(self, world: World) -> dict[str, Tensor]:
        """Return the counts since the last row over all ranks; empty if there are none."""
        if not self._has_counts:
            return {}
        local = self._interval_counts.tensors()
        return {
            name: world.all_reduce(local.get(name, zeros))
            for name, zeros in self._empty_counts.items()
        }

    def _note_new_findings(self, trainer: Trainer, findings: tuple[HealthFinding, ...]) -> None:
        new = [f for f in findings if (f.layer, f.rule) not in self._reported]
        self._reported = {(f.layer, f.rule) for f in findings}
        for finding in new:
            trainer.event_log.add_note(f"step {trainer.step}: {finding.sentence}")


def row_languages(record: RoutingRecord, *, batch: Batch) -> Int[Tensor, "B"]:
    """Return each row's language index for this layer: source in an encoder, else target."""
    encoder = record.layer.startswith("encoder")
    return batch.source_language if encoder else batch.target_language


def late_in_queue(context: TokenContext) -> Bool[Tensor, "T"]:
    """Return which tokens are in the later half of the order in which capacity is assigned."""
    order = context.position.argsort(stable=True)
    order = order[context.row_key[order].argsort(stable=True)]
    late = torch.zeros_like(order, dtype=torch.bool)
    late[order[(order.numel() + 1) // 2 :]] = True
    return late


def _new_counts(trainer: Trainer, languages: tuple[str, ...]) -> UsageCounter:
    moe = _first_moe(trainer.run)
    return UsageCounter(languages, num_null_experts=moe.null_experts.count() if moe else 0)


def _first_moe(run: Run) -> MoE | None:
    """Return the MoE config of the first stack that has one."""
    model = run.model
    layers = (model.moe_of_stack(stack) for stack in (model.encoder, model.decoder))
    return next((moe for moe in layers if isinstance(moe, MoE)), None)


def health_check_settings(run: Run, *, languages: tuple[str, ...]) -> RouterSettings:
    """Return the parts of the config that health findings refer to for causes and advice."""
    moe = _first_moe(run)
    if moe is None:
        return RouterSettings(languages)
    limit = moe.limit
    strongest = max(moe.balance, key=lambda term: term.balancing_weight(), default=None)
    is_balanced = strongest is not None and strongest.balancing_weight() > 0
    return RouterSettings(
        languages,
        top_k=max(1, round(moe.select.experts_per_token(moe.num_router_outputs))),
        balance_weight=sum(b.balancing_weight() for b in moe.balance),
        z_weight=sum(b.weight for b in moe.balance if isinstance(b, RouterZLoss)),
        capacity_factor=limit.factor if isinstance(limit, Capacity) else None,
        bias_rate=sum(b.rate for b in moe.balance if isinstance(b, BiasUpdate)),
        balance=type(strongest).__name__ if is_balanced else "SwitchBalance",
    )


def _zero_counts(run: Run, *, languages: int, device: torch.device) -> dict[str, Tensor]:
    """Return zero counts of every MoE layer; a rank of a pipeline holds only some layers."""
    counts: dict[str, Tensor] = {}
    for side, stack in (("encoder", run.model.encoder), ("decoder", run.model.decoder)):
        for layer in stack.moe_layers:
            moe = run.model.routed_moe_of_layer(stack, layer=layer)
            if moe is not None:
                edges = torch.zeros((moe.num_router_outputs + 1) * languages + 1, dtype=torch.long)
                counts[f"edges/{side}.{layer}"] = edges.to(device)
                counts[f"scales/{side}.{layer}"] = torch.zeros(4, dtype=torch.float64).to(device)
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
            found += routes_from_records(
                [record], language=row_languages(record, batch=report.result.batch)
            )
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
            for held_out in trainer.data.held_out_batches("valid", rows=PROBE_ROWS):
                batch = held_out.to(trainer.world.device)
                with trainer.objective.precision.autocast(batch.source.device):
                    records = trainer.model(batch).records  # on every rank: limits are collective
                if trainer.world.rank == 0:
                    found.append(routes_from_records(records, language=batch.target_language))
        trainer.model.train()
        if trainer.world.rank == 0 and any(found):
            _write_routing(self.folder / f"{_step_name(trainer.step)}.routes", trainer, found)


def _write_routing(path: Path, trainer: Trainer, batches: Iterable[Sequence[LayerRoutes]]) -> None:
    languages = trainer.objective.categories.languages
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
