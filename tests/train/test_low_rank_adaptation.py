"""LoRA: nothing changes at the start, gradients are the dense ones projected, merging is exact."""

import shutil

import pytest
import torch

from moesaic.checkpoint.full_checkpoint import load_checkpoint
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import adopt_files
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.checkpoint.stored_weights import load_transformer
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.nn.adapter import LowRankLinear, adapter_name, add_adapter, is_of_adapter
from moesaic.ops.permute import group_by_expert
from moesaic.optim.lr_schedule import WSD
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert_dispatch import AdaptiveExperts
from moesaic.parallel.tensor_parallel import SkipBiasLinear
from moesaic.recipes.lookup import warm_start
from moesaic.testing.tiny_models import random_batch, synthetic_run, tiny_model_config, tiny_run
from moesaic.train.low_rank_adaptation import LoRA
from moesaic.train.merge_adapter import merge_adapter
from moesaic.train.resume import ResumeLatest
from moesaic.train.run_checks import check_run
from moesaic.train.run_training import train
from moesaic.train.training_hooks import Hook, no_progress
from moesaic.train.warm_start import WeightsOfRun

LORA = LoRA(rank=2, alpha=6.0, targets=("experts", "attention"))


def models(choice=LORA, *, config=None):
    """Return a model, and the same with adapters that are not zero."""
    torch.manual_seed(0)
    base = Transformer(config or tiny_model_config())
    adapted = Transformer(base.config)
    adapted.load_state_dict(base.state_dict())
    choice.attach(adapted)
    for name, parameter in adapted.named_parameters():
        if is_of_adapter(name):
            torch.nn.init.normal_(parameter, std=0.1)
    return base, adapted


def loss_of(model):
    output = model(random_batch(4, seed=1))
    return model.loss(output).total + sum(sum(r.losses.values()) for r in output.records)


@pytest.mark.parametrize("bias", [False, True])
def test_merged_weights_give_the_loss_and_the_projected_gradients_of_the_adapter(bias):
    base, adapted = models(config=tiny_model_config().replace(bias=bias))
    adapter = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight.copy_(LORA.merged(weight, name=name, adapter=adapter))
    losses = [loss_of(model) for model in (base, adapted)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    checked = set()
    for name, weight in base.named_parameters():
        a, b = (adapter.get(adapter_name(name, part)) for part in "ab")
        if a is None:
            continue
        whole = LORA.scale * weight.grad
        grad_a, grad_b = (
            (whole @ b.mT, a.mT @ whole) if weight.dim() == 3 else (b.mT @ whole, whole @ a.mT)
        )
        torch.testing.assert_close(a.grad, grad_a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b.grad, grad_b, rtol=1e-4, atol=1e-6)
        checked |= {adapter_name(name, part) for part in "ab"}
    assert checked == {name for name in adapter if is_of_adapter(name)}


def test_adapters_that_are_zero_leave_the_bits_of_the_base():
    base, adapted = models()
    rows, of_expert = torch.randn(12, 16), torch.arange(12) % 4
    groups = group_by_expert(of_expert, num_experts=4)
    for name, parameter in adapted.named_parameters():
        if name.endswith("_b") and is_of_adapter(name):
            torch.nn.init.zeros_(parameter)
    for before, after in zip(base.encoder, adapted.encoder, strict=True):
        pairs = [(m.feed_forward.inner.experts, rows, {"groups": groups}) for m in (before, after)]
        first, second = (experts(x, **named) for experts, x, named in pairs)
        assert torch.equal(first, second)
        first, second = (m.self_attention.inner.qkv(rows) for m in (before, after))
        assert torch.equal(first, second)


class LastLoss(Hook):
    """Keeps the loss of a batch with the weights at the end."""

    def after_run(self, trainer) -> None:
        self.loss = loss_of(trainer.model.eval()).item()


@pytest.fixture(scope="module")
def init(data_home, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "init"
    train(synthetic_run(steps=2, schedule=WSD()), out, progress=no_progress)
    return out


def tuned(init, **changes):
    run = warm_start(str(init), changes=["steps=4", "checkpoint.every=2", "validation.every=0"])
    return run.replace(trainable=LORA, **changes)


def test_a_run_of_adapters_saves_little_resumes_and_merges_into_a_model(init, tmp_path):
    base, whole, parts = RunDir(init), RunDir(tmp_path / "whole"), RunDir(tmp_path / "parts")
    before, kept = base.model.read_bytes(), LastLoss()
    train(tuned(init), whole.path, hooks=[kept], progress=no_progress)
    train(tuned(init), parts.path, until=2, progress=no_progress)
    train(tuned(init), parts.path, resume=ResumeLatest(), progress=no_progress)
    assert parts.adapter.read_bytes() == whole.adapter.read_bytes()
    saved = load_checkpoint(whole.checkpoints).files
    adapter, weights = read_tensors(whole.adapter), read_tensors(base.model)
    assert set(saved["model"]) == set(adapter)
    assert all(map(is_of_adapter, adapter))
    assert not whole.model.exists()
    with pytest.raises(CheckpointError, match=r"moesaic ckpt merge .*whole"):
        RunDir.open(whole.path).require_weights()
    changed = merge_adapter(whole)
    merged = read_tensors(whole.model)
    assert changed == sum(not torch.equal(merged[n], weights[n]) for n in weights) == 11
    model = load_transformer(tuned(init).model, whole.model).eval()
    assert loss_of(model).item() == pytest.approx(kept.loss, rel=1e-6)
    assert base.model.read_bytes() == before


def test_sharded_ranks_write_the_adapter_of_one_process(init, tmp_path):
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    train(tuned(init), one.path, progress=no_progress)
    plan = ParallelConfig(plan=ParallelPlan(data=2, expert=2, zero=3))
    run = tuned(init, parallel=plan)

    def in_two_parts():
        train(run, two.path, until=2, progress=no_progress)
        train(run, two.path, resume=ResumeLatest(), progress=no_progress)

    run_on_ranks(2, in_two_parts)
    first, second = read_tensors(one.adapter), read_tensors(two.adapter)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


def test_adapters_of_other_weights_are_refused(init, tmp_path):
    out, other = tmp_path / "next", tmp_path / "other"
    train(tuned(init), out, until=2, progress=no_progress)
    shutil.copytree(init, other)
    write_tensors(
        RunDir(other).model, tensors=read_tensors(RunDir(init).model) | {"x": torch.ones(1)}
    )
    adopt_files(RunDir(other))
    moved = tuned(init).replace(initial_weights=WeightsOfRun(path=str(other)))
    with pytest.raises(CheckpointError, match=r"adapters are for weights with the hash"):
        train(moved, out, resume=ResumeLatest(), progress=no_progress)
    with pytest.raises(CheckpointError, match=r"needs? no merging"):
        merge_adapter(RunDir(other))


def test_what_adapters_cannot_do_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"trainable=LoRA .*--init MODEL"):
        check_run(tiny_run(trainable=LORA))
    router = tiny_run(trainable=LoRA(targets=("router",)))
    with pytest.raises(ConfigError, match=r"targets: no parameter matches 'router'"):
        check_run(router)
    plan = ParallelConfig(plan=ParallelPlan(data=1, expert=2), dispatch=AdaptiveExperts())
    model = Transformer(tiny_model_config())
    LORA.attach(model)
    layer = model.encoder[0].feed_forward.inner
    assert "adapter" in (plan.dispatch.problems(layer, plan=plan.plan) or "")


def test_a_rank_that_adds_no_bias_adds_the_adapter():
    linear = torch.nn.Linear(6, 4)
    add_adapter(linear, LowRankLinear(linear, rank=2, scale=1.0))
    torch.nn.init.normal_(linear.get_parameter("adapter.weight_b"))
    x = torch.randn(3, 6)
    torch.testing.assert_close(SkipBiasLinear(linear)(x), linear(x) - linear.bias)
