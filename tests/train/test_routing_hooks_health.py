"""Router health hook: usage by layer, expert and language, equal for any number of ranks."""

from pathlib import Path

import torch

from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.world import ProcessGroupWorld, SingleProcess, World
from moesaic.moe.config import MoE
from moesaic.moe.expert_capacity import Capacity, PositionPriority, RandomPriority
from moesaic.moe.router_context import TokenContext
from moesaic.monitor.expert_usage import RecordedUsage, read_usage
from moesaic.monitor.health_record import read_findings
from moesaic.testing.tiny_models import (
    LANGUAGES,
    TinyStream,
    tiny_model_config,
    tiny_run,
    tiny_trainer,
)
from moesaic.train.loop import training_loop
from moesaic.train.routing_hooks import RouterHealthHook, late_in_queue
from moesaic.train.run import LogConfig


def _watch(path: Path, world: World) -> None:
    run = tiny_run(log=LogConfig(every=4, routing_stats_every=2))
    trainer = tiny_trainer(run, world=world)
    training_loop(
        trainer,
        hooks=[RouterHealthHook(path, trainer=trainer, findings=path.with_name("health.json"))],
        until=6,
    )


def _on_rank(path: Path) -> None:
    _watch(path, ProcessGroupWorld())


def _equal(left: RecordedUsage, right: RecordedUsage) -> bool:
    pairs = zip(left.layers, right.layers, strict=True)
    return all(a.layer == b.layer and (a.counts == b.counts).all() for a, b in pairs)


def test_every_token_of_every_other_step_is_counted_once(tmp_path: Path) -> None:
    _watch(tmp_path / "usage.json", SingleProcess())
    usage = read_usage(tmp_path / "usage.json")
    assert [layer.layer for layer in usage.layers] == ["encoder.0", "decoder.0"]
    stream = TinyStream()
    batches = [next(stream) for _ in range(6)][1::2]  # steps 2, 4, 6
    for layer, side in zip(usage.layers, ("source", "target"), strict=True):
        for index in range(len(LANGUAGES)):
            tokens = 0
            for batch in batches:
                language = batch.groups[f"{side}_language"]
                rows = batch.source if side == "source" else batch.target
                tokens += int(rows.lengths[language == index].sum())
            assert int(layer.counts[:, index].sum()) == tokens


def test_several_ranks_count_the_same_as_one(tmp_path: Path) -> None:
    _watch(tmp_path / "one.json", SingleProcess())
    run_on_ranks(2, _on_rank, tmp_path / "two.json")
    assert _equal(read_usage(tmp_path / "one.json"), read_usage(tmp_path / "two.json"))


def test_a_collapsed_router_is_named_with_its_layer(tmp_path: Path) -> None:
    trainer = tiny_trainer(tiny_run(log=LogConfig(every=1, routing_stats_every=1)))
    trainer.data = TinyStream(rows=64)
    with torch.no_grad():
        trainer.model.decoder[0].feed_forward.inner.router.gate.weight.zero_()
        for parameter in trainer.model.parameters():
            parameter.requires_grad_(requires_grad=False)
        trainer.model.encoder_norm.weight.requires_grad_()
    path = tmp_path / "health.json"
    hook = RouterHealthHook(tmp_path / "r.json", trainer=trainer, findings=path)
    training_loop(trainer, hooks=[hook], until=4)
    notes = trainer.event_log.pop_notes()
    recorded = read_findings(path)
    assert notes == [f"step {r.first_step}: {r.finding.sentence}" for r in recorded]
    assert any("decoder.0" in note and "try" in note for note in notes), notes
    assert "decoder.0" in trainer.event_log.router_health


def test_queue_position_depends_on_row_keys_not_batch_order() -> None:
    row = torch.tensor([0, 0, 1, 1, 2, 2])
    key = torch.tensor([70, 10, 40])[row]
    none = torch.zeros(6, dtype=torch.long)
    context = TokenContext(row, torch.tensor([0, 1] * 3), none, none, key)
    assert late_in_queue(context).tolist() == [True, True, False, False, False, True]


def test_late_drops_are_found_for_position_priority_only(tmp_path: Path) -> None:
    shares = {}
    for priority in (PositionPriority(), RandomPriority()):
        moe = MoE(experts=4, limit=Capacity(factor=0.5, priority=priority))
        run = tiny_run(
            log=LogConfig(every=1, routing_stats_every=1), model=tiny_model_config(moe=moe)
        )
        trainer = tiny_trainer(run)
        trainer.data = TinyStream(rows=64)
        training_loop(
            trainer,
            hooks=[
                RouterHealthHook(
                    tmp_path / "u.json", trainer=trainer, findings=tmp_path / "health.json"
                )
            ],
            until=1,
        )
        (layer, _) = read_usage(tmp_path / "u.json").layers
        shares[type(priority)] = layer.dropped_late / layer.dropped.sum()
    assert shares[PositionPriority] > 0.8
    assert 0.4 < shares[RandomPriority] < 0.6
