"""Routes of a run in progress: of training steps, and of one held-out text as training goes on."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from moesaic.checkpoint.routes import RoutesWriter
from moesaic.moe.routes import LayerRoutes, routes_from_records
from moesaic.train.hooks.hook import Hook
from moesaic.train.hooks.usage import row_languages
from moesaic.train.randomness import preserve_random_state
from moesaic.train.trainer import StepReport, Trainer

PROBE_ROWS = 2  # of each task and direction: some thousand tokens say how alike two routers are
_STEP_FILE = re.compile(r"step-(\d{8})(\.rank-\d+)?\.routes")


class RoutingTraceHook(Hook):
    """Writes the routing of one step in ``log.record_every`` as a file of its own.

    Of the step's last micro-batch, as it was used: after noise, and with what a limit dropped. Each
    rank writes the rows that it had.
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
            found += routes_from_records([record], language=row_languages(record, batch=report.result.batch))
        world = trainer.world
        rank = f".rank-{world.rank}" if world.size > 1 else ""
        _write_routing(self.folder / f"{_step_name(report.step)}{rank}.routes", trainer, [found])


class RoutingProbeHook(Hook):
    """Routes the same held-out rows every ``log.probe_every`` steps, and keeps how.

    So that it can be seen when routing settles (the report's part on routing).
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
            return  # a pipeline has no rank that sees every layer of a batch
        found = []
        trainer.model.eval()
        with torch.no_grad(), preserve_random_state(trainer.world.device):
            for batch in trainer.data.held_out_batches("valid", rows=PROBE_ROWS):
                there = batch.to(trainer.world.device)
                with trainer.objective.precision.autocast(there.source.device):
                    records = trainer.model(there).records  # on every rank: limits are collective
                if trainer.world.rank == 0:
                    found.append(routes_from_records(records, language=there.target_language))
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
    """A run that goes back to an earlier step writes what came after it anew."""
    for path in folder.glob("step-*.routes") if trainer.world.rank == 0 else ():
        found = _STEP_FILE.fullmatch(path.name)
        if found and int(found[1]) > trainer.step:
            path.unlink()
