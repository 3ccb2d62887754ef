"""WatchUsage: which experts took which language, and the router doctor's opinion of it."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from moesaic.core.shapes import Bool, Int, Tensor
from moesaic.data.batch import Batch
from moesaic.dist.world import World
from moesaic.moe.balance import RouterZLoss
from moesaic.moe.balances.bias import BiasUpdate
from moesaic.moe.config import MoE
from moesaic.moe.context import TokenContext
from moesaic.moe.limit import Capacity
from moesaic.moe.record import RoutingRecord
from moesaic.observe.doctor import RouterHealthMonitor, summarize_health, describe_findings
from moesaic.observe.layer_counts import summarize_load
from moesaic.observe.signs import HealthFinding, RouterSettings
from moesaic.observe.usage import LogitStats, UsageCounter
from moesaic.train.hooks.hook import Hook
from moesaic.train.run import Run
from moesaic.train.trainer import StepReport, Trainer


class WatchUsage(Hook):
    """Counts one step of ``log.routes_every``; examines the counts at every row of metrics.

    Counts since the last row, and those of the whole run (``usage.json``), are saved with a
    checkpoint. An encoder layer's tokens count for the source language, a decoder's for the target.
    """

    def __init__(self, path: Path, *, trainer: Trainer) -> None:
        self.path = path
        languages = trainer.objective.categories.languages
        self._new, self._all = _counts(trainer, languages), _counts(trainer, languages)
        self._nothing = _zeros(trainer.run, languages=len(languages), device=trainer.world.device)
        self._due = False  # whether a step was counted since the last row, here or elsewhere
        self._doctor = RouterHealthMonitor(doctor_setting(trainer.run, languages=languages))
        self._known: set[tuple[str, str]] = set()
        trainer.parts["routes"] = self  # the name that checkpoints know it by

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        log = trainer.run.log
        if report.step % log.routes_every == 0:
            self._due = bool(self._nothing)
            for record in report.seen.records:
                self._count(record, batch=report.seen.batch)
        if log.due(report.step, steps=trainer.run.steps) and self._due:
            self._examine(trainer)

    def after_run(self, trainer: Trainer) -> None:
        whole = _counts(trainer, self._all.languages)
        whole.merge(dict(_in_order(self._all.tensors())))
        whole.merge(self._summed(trainer.world))
        if trainer.world.rank == 0 and whole.tensors():
            whole.write(self.path)

    def tensors(self, world: World) -> dict[str, Tensor]:
        """Return both sums for a checkpoint. Collective."""
        new = {f"new/{name}": value for name, value in self._summed(world).items()}
        return new | {f"all/{name}": value for name, value in self._all.tensors().items()}

    def restore(self, tensors: Mapping[str, Tensor], *, world: World) -> None:
        """Put them back; the sum since the last row goes to rank 0 alone."""
        for counts, prefix, mine in (
            (self._new, "new/", world.rank == 0),
            (self._all, "all/", True),
        ):
            named = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            counts.reset()
            counts.merge({n: t.to(world.device) * int(mine) for n, t in _in_order(named)})
        self._due = any(name.startswith("new/") for name in tensors)

    def _count(self, record: RoutingRecord, *, batch: Batch) -> None:
        routing = record.routing
        languages = language_of(record, batch=batch)
        self._new.add_edges(
            record.layer,
            expert=routing.expert,
            language=languages[record.row[routing.token]],
            num_experts=routing.num_experts,
            late=late_in_queue(record.context)[routing.token],
            logit_stats=LogitStats(record.router_entropy(), record.logit_rms()),
        )

    def _examine(self, trainer: Trainer) -> None:
        interval = _counts(trainer, self._new.languages)
        interval.merge(self._summed(trainer.world))
        self._new.reset()
        self._due = False
        self._all.merge(dict(_in_order(interval.tensors())))
        layers = interval.layers()
        findings = self._doctor.check_interval(layers)
        trainer.journal.put(summarize_load(layers))
        trainer.journal.health = summarize_health(findings)
        self._say_new(trainer, findings)

    def _summed(self, world: World) -> dict[str, Tensor]:
        """Return the counts since the last row over all ranks; nothing where none was made."""
        if not self._due:
            return {}
        here = self._new.tensors()
        return {name: world.all_reduce(here.get(name, none)) for name, none in self._nothing.items()}

    def _say_new(self, trainer: Trainer, findings: tuple[HealthFinding, ...]) -> None:
        fresh = [f for f in findings if (f.layer, f.rule) not in self._known]
        self._known = {(f.layer, f.rule) for f in findings}
        for sentence in describe_findings(fresh):
            trainer.journal.note(f"step {trainer.step}: {sentence}")


def language_of(record: RoutingRecord, *, batch: Batch) -> Int[Tensor, "B"]:
    """Return the language index that a batch row's tokens have in this layer."""
    encoder = record.layer.startswith("encoder")
    return batch.source_language if encoder else batch.target_language


def late_in_queue(context: TokenContext) -> Bool[Tensor, "T"]:
    """Return which tokens are in the later half, in the order in which rows queue for room."""
    order = context.position.argsort(stable=True)
    order = order[context.row_key[order].argsort(stable=True)]
    late = torch.zeros_like(order, dtype=torch.bool)
    late[order[(order.numel() + 1) // 2 :]] = True
    return late


def _counts(trainer: Trainer, languages: tuple[str, ...]) -> UsageCounter:
    moe = _mixture(trainer.run)
    return UsageCounter(languages, num_null_experts=moe.null_experts.count() if moe else 0)


def _mixture(run: Run) -> MoE | None:
    """The mixture of the first stack that has one."""
    model = run.model
    mixtures = [model.moe_of_stack(stack) for stack in (model.encoder, model.decoder)]
    return next((moe for moe in mixtures if isinstance(moe, MoE)), None)


def doctor_setting(run: Run, *, languages: tuple[str, ...]) -> RouterSettings:
    """Return what the doctor needs of the config for causes and advice."""
    moe = _mixture(run)
    if moe is None:
        return RouterSettings(languages)
    limit = moe.limit
    strongest = max(moe.balance, key=lambda term: term.balancing_weight(), default=None)
    evens = strongest is not None and strongest.balancing_weight() > 0
    return RouterSettings(
        languages,
        top_k=max(1, round(moe.select.experts_per_token(moe.num_router_outputs))),
        balance_weight=sum(b.balancing_weight() for b in moe.balance),
        z_weight=sum(b.weight for b in moe.balance if isinstance(b, RouterZLoss)),
        capacity_factor=limit.factor if isinstance(limit, Capacity) else None,
        bias_rate=sum(b.rate for b in moe.balance if isinstance(b, BiasUpdate)),
        balance=type(strongest).__name__ if evens else "SwitchBalance",
    )


def _zeros(run: Run, *, languages: int, device: torch.device) -> dict[str, Tensor]:
    """Return empty counts of every layer with experts: a rank may hold some of them alone."""
    found: dict[str, Tensor] = {}
    for side, stack in (("encoder", run.model.encoder), ("decoder", run.model.decoder)):
        for layer in stack.moe_layers:
            moe = run.model.routed_moe_of_layer(stack, layer=layer)
            if moe is not None:
                edges = torch.zeros((moe.num_router_outputs + 1) * languages + 1, dtype=torch.long)
                found[f"edges/{side}.{layer}"] = edges.to(device)
                found[f"scales/{side}.{layer}"] = torch.zeros(4, dtype=torch.float64).to(device)
    return found


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Sort ``edges/encoder.10`` by kind, encoder first, and number: the order people read."""
    return sorted(tensors.items(), key=lambda item: _place(item[0]))


def _place(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    parts = re.split(r"[/.]", name)
    return "decoder" in parts, [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]
