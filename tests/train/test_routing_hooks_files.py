"""Routing hooks: traced training steps and probes of held-out text."""

from pathlib import Path

import torch

from moesaic.checkpoint.routes_file import RoutesFile
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.routing_agreement import compare_routes
from moesaic.optim.optimizer import AdamW
from moesaic.testing.tiny_models import TinyStream, tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.routing_hooks import RoutingProbeHook, RoutingTraceHook
from moesaic.train.run import LogConfig
from moesaic.train.trainer import StepReport, Trainer
from moesaic.train.training_hooks import Hook


class _Keep(Hook):
    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        del trainer
        self.reports.append(report)


def _train(folder: Path, *, until: int, world: World | None = None, **log: int) -> _Keep:
    moe = MoE(experts=4, limit=Capacity(factor=0.7, eval_factor=None))
    fast = AdamW(lr=0.02)  # so that a few steps change who goes where
    run = tiny_run(log=LogConfig(**log), model=tiny_model_config(moe=moe), optimizer=fast)
    trainer = tiny_trainer(run, world=world)
    kept = _Keep()
    hooks = [RoutingTraceHook(folder / "routes"), RoutingProbeHook(folder / "learning"), kept]
    training_loop(trainer, hooks=hooks, until=until)
    return kept


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_traced_step_records_its_routing(tmp_path: Path) -> None:
    kept = _train(tmp_path, until=5, routing_trace_every=2, routing_probe_every=0)
    assert _names(tmp_path / "routes") == ["step-00000002.routes", "step-00000004.routes"]
    assert not (tmp_path / "learning").exists()
    file = RoutesFile(tmp_path / "routes" / "step-00000004.routes")
    assert file.about == {"run": "tiny", "step": 4}
    (routes,) = file
    seen = kept.reports[3].result
    assert [found.layer for found in routes] == [r.layer for r in seen.records]
    languages = [seen.batch.groups[f"{side}_language"] for side in ("source", "target")]
    for found, record, language in zip(routes, seen.records, languages, strict=True):
        assert torch.equal(found.routing.expert, record.routing.expert)
        assert found.routing.dropped.any()
        assert torch.equal(found.tokens.token, record.context.token)
        assert torch.equal(found.tokens.language, language[record.row])


def test_the_probe_routes_the_same_text_at_step_0_and_every_interval(tmp_path: Path) -> None:
    _train(tmp_path, until=5, routing_probe_every=2)
    steps = [0, 2, 4]
    assert _names(tmp_path / "learning") == [f"step-{step:08d}.routes" for step in steps]
    files = [RoutesFile(tmp_path / "learning" / name) for name in _names(tmp_path / "learning")]
    held_out = next(TinyStream().held_out_batches("valid", rows=None))
    ((encoder, _),) = files[0]
    assert torch.equal(encoder.tokens.token, held_out.source.values[held_out.source.real])
    assert not encoder.routing.dropped.any()  # in evaluation nothing is
    assert compare_routes(files[0], files[0]).edges == 1
    assert compare_routes(files[0], files[2]).edges < 1


def test_probing_and_tracing_do_not_change_training(tmp_path: Path) -> None:
    watched = _train(tmp_path / "a", until=3, routing_probe_every=1, routing_trace_every=1)
    alone = _train(tmp_path / "b", until=3, routing_probe_every=0)
    for one, other in zip(watched.reports, alone.reports, strict=True):
        assert torch.equal(one.result.sums.losses, other.result.sums.losses)


def test_routing_files_of_later_steps_are_deleted_on_resume(tmp_path: Path) -> None:
    _train(tmp_path, until=4, routing_probe_every=2, routing_trace_every=1)
    (tmp_path / "learning" / "notes.txt").write_text("mine")
    _train(tmp_path, until=1, routing_probe_every=2, routing_trace_every=1)
    assert _names(tmp_path / "learning") == ["notes.txt", "step-00000000.routes"]
    assert _names(tmp_path / "routes") == ["step-00000001.routes"]


def _on_rank(folder: Path) -> None:
    _train(folder, until=1, world=ProcessGroupWorld(), routing_probe_every=1, routing_trace_every=1)


def test_each_rank_traces_its_rows_and_rank_0_probes(tmp_path: Path) -> None:
    run_on_ranks(2, _on_rank, tmp_path)
    _train(tmp_path / "alone", until=1, world=SingleProcess(), routing_trace_every=1)
    names = [f"step-00000001.rank-{rank}.routes" for rank in (0, 1)]
    assert _names(tmp_path / "routes") == names
    assert _names(tmp_path / "learning") == ["step-00000000.routes", "step-00000001.routes"]

    def tokens(path: Path) -> int:
        return sum(len(found.tokens) for routes in RoutesFile(path) for found in routes)

    shares = [tokens(tmp_path / "routes" / name) for name in names]
    assert sum(shares) == tokens(tmp_path / "alone" / "routes" / "step-00000001.routes")
    assert min(shares) > 0
