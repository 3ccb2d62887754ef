"""Health settings are each layer's own, and their advice can be taken."""

import re
import shlex
from dataclasses import replace

import numpy as np
import pytest

from moesaic.core.config_text import iter_leaves
from moesaic.moe.auxiliary_losses import (
    Balance,
    DeviceBalance,
    EntropyBalance,
    RouterZLoss,
    SequenceBalance,
    SwitchBalance,
)
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import Capacity, PositionPriority
from moesaic.moe.expert_selection import NullTopK, SwitchTop1, TopK
from moesaic.moe.expert_selection_dynamic import Threshold
from moesaic.moe.null_experts import ZeroExperts
from moesaic.monitor.expert_usage import LayerUsage, read_usage
from moesaic.monitor.health_rules import HEALTH_RULES, LayerInterval
from moesaic.monitor.router_health import RouterHealthMonitor
from moesaic.optim.optimizer import AdamW, Muon
from moesaic.testing.tiny_models import (
    LANGUAGES,
    TinyStream,
    tiny_model_config,
    tiny_run,
    tiny_trainer,
)
from moesaic.train.loop import training_loop
from moesaic.train.router_layers import health_check_settings
from moesaic.train.routing_hooks import RouterHealthHook
from moesaic.train.run import LogConfig

# They differ in everything that a finding depends on.
ENCODER = MoE(
    experts=6,
    select=NullTopK(k=3),
    null_experts=ZeroExperts(number=2),
    balance=(RouterZLoss(weight=0.002), DeviceBalance(weight=0.02, num_groups=2)),
)
DECODER = MoE(
    experts=4,
    select=SwitchTop1(),
    limit=Capacity(factor=1.5, priority=PositionPriority()),
    balance=(EntropyBalance(), BiasUpdate(rate=0.004)),
)


def two_sided(**changes):
    model = tiny_model_config(moe=ENCODER)
    return tiny_run(model=model.replace(decoder=model.decoder.replace(moe=DECODER)), **changes)


def test_each_layer_has_its_own_settings() -> None:
    found = health_check_settings(two_sided(), languages=LANGUAGES)
    encoder, decoder = found["encoder.0"], found["decoder.0"]
    assert (encoder.top_k, decoder.top_k) == (3, 1)
    assert (encoder.balance_weight, decoder.balance_weight) == (0.02, 0.0)
    assert (encoder.capacity_factor, decoder.capacity_factor) == (None, 1.5)
    assert (encoder.bias_rate, decoder.bias_rate) == (0.0, 0.004)
    assert (encoder.balance_place, encoder.z_place, decoder.bias_place) == (1, 0, 1)
    assert (encoder.moe, decoder.moe) == ("model.moe", "model.decoder.moe")


def test_usage_counts_the_null_experts_of_each_layer(tmp_path) -> None:
    trainer = tiny_trainer(two_sided(log=LogConfig(every=1, routing_stats_every=1)))
    trainer.data = TinyStream(rows=8)
    hook = RouterHealthHook(
        tmp_path / "usage.json", trainer=trainer, findings=tmp_path / "health.json"
    )
    training_loop(trainer, hooks=[hook], until=1)
    encoder, decoder = read_usage(tmp_path / "usage.json").layers
    assert (encoder.num_experts, encoder.num_null_experts) == (8, 2)
    assert (decoder.num_experts, decoder.num_null_experts) == (4, 0)


def usage(layer: str, experts: int, **facts) -> LayerUsage:
    counts = np.full((experts, len(LANGUAGES)), 50, dtype=np.int64)
    return LayerUsage(layer, counts, np.zeros(len(LANGUAGES), dtype=np.int64), **facts)


def test_a_dead_last_expert_of_the_side_without_null_experts_is_reported() -> None:
    monitor = RouterHealthMonitor(
        health_check_settings(two_sided(), languages=LANGUAGES), patience=1
    )
    encoder, decoder = usage("encoder.0", 8, num_null_experts=2), usage("decoder.0", 4)
    for layer in (encoder, decoder):
        layer.counts[-1] = 0
    (finding,) = monitor.check_interval([encoder, decoder])
    assert (finding.layer, finding.rule) == ("decoder.0", "dead_experts")
    assert "model.decoder.moe.balance.1.rate=0.012" in finding.advice


def test_settings_of_the_only_stack_with_experts() -> None:
    model = tiny_model_config(moe=NoMoE())
    depths = MoE(experts=1, select=Threshold())
    model = model.replace(decoder=model.decoder.replace(moe=depths))
    found = health_check_settings(tiny_run(model=model), languages=LANGUAGES)
    assert {name: one.top_k for name, one in found.items()} == {"decoder.0": 1}


def test_settings_sum_all_balancing_terms() -> None:
    def setting(*balance: Balance):
        moe = MoE(experts=8, select=TopK(k=2), balance=balance)
        run = tiny_run(model=tiny_model_config(moe=moe))
        return health_check_settings(run, languages=LANGUAGES)["encoder.0"]

    found = setting(SequenceBalance(weight=0.1), DeviceBalance(weight=0.2), EntropyBalance())
    assert found.balance_weight == pytest.approx(0.3)
    assert (found.balance_place, found.bias_rate) == (1, 0.0)
    free = setting(BiasUpdate(rate=0.002), RouterZLoss(weight=0.5))
    assert (free.balance_weight, free.bias_rate, free.z_weight) == (0.0, 0.002, 0.5)


def skewed(layer: str, experts: int, nulls: int):
    """Usages that make every rule speak."""
    even = usage(layer, experts, num_null_experts=nulls)
    loads = [
        np.r_[900, np.zeros(experts - 1)],
        np.r_[0, np.full(experts - 1, 90)],
        np.r_[900, np.full(experts - 1, 60)],
        np.r_[np.ones(experts - 1), 5000],
        np.zeros(experts),
    ]
    for load in loads:
        yield replace(even, counts=np.repeat(load[:, None].astype(np.int64), 3, 1))
    taken = even.counts.copy()
    taken[:, 2], taken[0] = 1, (4, 4, 900)
    yield replace(even, counts=taken)
    for scale in ({"router_entropy": 0.001}, {"router_entropy": 0.999}, {"logit_rms": 90.0}):
        yield replace(even, **scale)
    yield replace(even, logit_rms=float("inf"))
    yield replace(even, dropped=np.array([90, 90, 90]), dropped_late=260)
    yield replace(even, dropped=np.array([2, 2, 300]), dropped_late=3)


OPTIMIZERS = (Muon(lr=0.03, adamw=AdamW(lr=2e-3)), AdamW(lr=1e-3, router_lr=1e-4))
BALANCES = ((), (SwitchBalance(weight=0.2),), (SwitchBalance(), RouterZLoss()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["muon", "adamw"])
def test_every_advice_can_be_taken(optimizer) -> None:
    runs = [two_sided(optimizer=optimizer)]
    runs += [
        tiny_run(optimizer=optimizer, model=tiny_model_config(moe=MoE(experts=4, balance=balance)))
        for balance in BALANCES
    ]
    spoken = set()
    for run in runs:
        keys = {path for path, _ in iter_leaves(run.to_dict(), "")}
        for name, settings in health_check_settings(run, languages=LANGUAGES).items():
            moe = ENCODER if settings.top_k == 3 else DECODER
            for one in skewed(name, moe.num_router_outputs, moe.null_experts.count()):
                if one.dropped.any() and settings.capacity_factor is None:
                    continue  # nothing is dropped without a limit
                interval = LayerInterval(one, settings, (0.99, 0.9, 0.8, 0.7, 0.6))
                for finding in filter(None, (rule(interval) for rule in HEALTH_RULES)):
                    spoken.add(finding.rule)
                    assert_can_be_taken(finding.advice, run, keys=keys)
    assert spoken == {rule.__name__ for rule in HEALTH_RULES}


def assert_can_be_taken(advice, run, *, keys):
    changes = re.findall(r"--set ('[^']*'|[^ ]*[^ ,.;])", advice)
    for change in changes:
        (text,) = shlex.split(change)
        assert run.override([text]) != run, text
    rest = re.sub(r"--set ('[^']*'|[^ ]*)", "", advice)
    for name in re.findall(r"[a-z_]+(?:\.[a-z_]+)+|\w+_\w+", rest):
        assert any(key == name or key.startswith(name + ".") for key in keys), name
