"""Adapters: zero at the start, gradients are the dense ones projected, merging is exact."""

import shutil

import pytest
import torch

from moesaic.checkpoint.full_checkpoint import load_checkpoint
from moesaic.checkpoint.run_directory import RunDir
from moesaic.checkpoint.run_record import (
    adopt_files,
    copy_beside_weights,
    run_problems,
    write_run_record,
)
from moesaic.checkpoint.safetensors_io import read_tensors, write_tensors
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.model.transformer import Transformer
from moesaic.model.weights import export_weights
from moesaic.monitor.expert_usage import read_usage
from moesaic.nn.adapter import LowRankLinear, adapter_name, add_adapter, is_of_adapter
from moesaic.ops.permute import group_by_expert
from moesaic.optim.lr_schedule import WSD
from moesaic.parallel.adapter_choice import adaptable_matrices
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert_dispatch import AdaptiveExperts
from moesaic.parallel.low_rank_adaptation import LoRA
from moesaic.parallel.sparse_adaptation import ExpertsOfLanguage, RandomSparse, SpIEL
from moesaic.parallel.tensor_parallel import SkipBiasLinear
from moesaic.recipes.lookup import warm_start
from moesaic.serve.load_model import load
from moesaic.testing.tiny_models import (
    TinyStream,
    random_batch,
    synthetic_run,
    tiny_model_config,
    tiny_run,
    tiny_trainer,
)
from moesaic.train.loop import training_loop
from moesaic.train.merge_adapter import merge_adapter
from moesaic.train.resume import ResumeLatest
from moesaic.train.run import LogConfig, Run
from moesaic.train.run_checks import check_run
from moesaic.train.run_training import train
from moesaic.train.sparse_selection import selection_hooks
from moesaic.train.training_hooks import Hook, no_progress
from moesaic.train.warm_start import WeightsOfRun

LORA = LoRA(rank=2, alpha=6.0, targets=("experts", "attention"))
SPARSE = RandomSparse(density=0.05)
SPIEL = SpIEL(density=0.05, every=4, select_steps=3)
ROWS = ExpertsOfLanguage(
    language="qaa_Latn", experts=dict.fromkeys(("encoder.0", "decoder.0"), (0, 2))
)


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


def projected(choice, name, gradient, adapter) -> dict[str, torch.Tensor]:
    """Return the gradients of the adapter of a matrix, by definition, from the matrix's own."""
    parts = {p: adapter.get(adapter_name(name, p)) for p in ("a", "b", "delta", "index")}
    if parts["a"] is not None:
        whole, a, b = LORA.scale * gradient, parts["a"], parts["b"]
        experts = gradient.dim() == 3
        both = (whole @ b.mT, a.mT @ whole) if experts else (b.mT @ whole, whole @ a.mT)
        return {adapter_name(name, part): each for part, each in zip("ab", both, strict=True)}
    if parts["index"] is not None:
        picked = gradient.flatten(-2).gather(-1, parts["index"].long())
        return {adapter_name(name, "delta"): picked}
    if parts["delta"] is not None:
        return {adapter_name(name, "delta"): gradient[[0, 2]]}
    return {}


@pytest.mark.parametrize(
    ("choice", "bias"), [(LORA, False), (LORA, True), (SPARSE, False), (ROWS, False)]
)
def test_merged_weights_give_the_loss_and_the_projected_gradients_of_the_adapter(choice, bias):
    base, adapted = models(choice, config=tiny_model_config().replace(bias=bias))
    adapter, wanted = export_weights(adapted), {}
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight.copy_(choice.merged(weight, name=name, adapter=adapter))
    losses = [loss_of(model) for model in (base, adapted)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name, weight in base.named_parameters():
        wanted |= projected(choice, name, weight.grad, adapter)
    found = {n: p.grad for n, p in adapted.named_parameters() if is_of_adapter(n)}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


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
    log = LogConfig(routing_stats_every=1)
    train(synthetic_run(steps=2, schedule=WSD(), log=log), out, progress=no_progress)
    return out


def tuned(init, trainable=LORA, **changes):
    run = warm_start(str(init), changes=["steps=4", "checkpoint.every=2", "validation.every=0"])
    return run.replace(trainable=trainable, **changes)


def adapter_run(init, path, choice) -> RunDir:
    """Make a run of random adapters beside the weights of ``init``, as training leaves it."""
    out, run = RunDir(path), tuned(init, choice)
    _, adapted = models(choice, config=run.model)
    start = run.initial_weights.pinned()
    path.mkdir()
    copy_beside_weights(RunDir(init), to=out)
    run = run.replace(initial_weights=start)
    out.config.write_text(run.to_yaml())
    weights = export_weights(adapted)
    write_tensors(out.adapter, tensors={n: t for n, t in weights.items() if is_of_adapter(n)})
    write_run_record(out, config=run.to_dict(), plugins=())
    return out


def logits_of(model):
    torch.manual_seed(1)
    return model.logits(torch.randint(5, 40, (2, 5)), source=torch.randint(5, 40, (2, 6))).detach()


@pytest.mark.parametrize(("choice", "matrices"), [(LORA, 11), (SPIEL, 11)])
def test_a_run_of_adapters_saves_little_resumes_and_merges_into_a_model(
    init, tmp_path, choice, matrices
):
    base, whole, parts = RunDir(init), RunDir(tmp_path / "whole"), RunDir(tmp_path / "parts")
    before, kept, run = base.model.read_bytes(), LastLoss(), tuned(init, choice)
    train(run, whole.path, hooks=[kept], progress=no_progress)
    train(run, parts.path, until=2, progress=no_progress)
    merge_adapter(parts)
    train(run, parts.path, resume=ResumeLatest(), progress=no_progress)
    assert not parts.model.exists(), "it was merged with an earlier adapter"
    assert parts.adapter.read_bytes() == whole.adapter.read_bytes()
    saved = load_checkpoint(whole.checkpoints).files
    adapter, weights = read_tensors(whole.adapter), read_tensors(base.model)
    assert set(saved["model"]) == set(adapter)
    assert all(map(is_of_adapter, adapter))
    assert not whole.model.exists()
    with pytest.raises(CheckpointError, match=r"moesaic ckpt merge .*whole"):
        RunDir.open(whole.path).require_whole_weights()
    newest = max(whole.checkpoints.glob("step-*"), key=lambda path: path.name)
    unmerged = loss_of(load(newest).model).item()
    assert unmerged == pytest.approx(kept.loss, rel=1e-6)
    changed = merge_adapter(whole)
    merged = read_tensors(whole.model)
    assert changed == sum(not torch.equal(merged[n], weights[n]) for n in weights) == matrices
    assert loss_of(load(whole.path).model).item() == pytest.approx(kept.loss, rel=1e-6)
    assert base.model.read_bytes() == before


@pytest.mark.parametrize(
    ("choice", "exact"),
    [
        (LORA, False),
        (SPARSE, False),
        (SPIEL.replace(targets=("experts",)), True),
        (ROWS, True),
    ],
)
def test_an_adapter_beside_its_weights_is_the_merged_model(init, tmp_path, choice, exact):
    out = adapter_run(init, tmp_path / "out", choice)
    before = load(out.path)
    assert not torch.equal(*(logits_of(model) for model in (before, load(init))))
    merge_adapter(out)
    after, noise = load(out.path), 0.0 if exact else 1e-5
    torch.testing.assert_close(logits_of(before), logits_of(after), rtol=noise, atol=noise)
    first, second = (m.translate("w1 w2 w3", source="en", target="qaa") for m in (before, after))
    assert first.text == second.text


def test_an_adapter_without_the_weights_that_it_was_trained_beside_is_refused(init, tmp_path):
    base = RunDir(tmp_path / "base")
    shutil.copytree(init, base.path)
    out = adapter_run(base.path, tmp_path / "out", LORA)
    assert not run_problems(out)
    moved = base.path.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"another run .*no such run(.|\n)*ckpt adopt .*out"):
        load(out.path)
    text = out.config.read_text()
    out.config.write_text(text.replace(str(base.path), str(moved)))
    adopt_files(out)
    load(out.path)
    out.config.write_text(text)
    adopt_files(out)
    moved.rename(base.path)
    write_tensors(base.model, tensors=read_tensors(base.model) | {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"another run .*trained beside other weights"):
        load(out.path)


def test_the_experts_of_a_language_are_those_that_got_most_of_its_edges(init, tmp_path):
    out, base = RunDir(tmp_path / "out"), RunDir(init)
    choice = ExpertsOfLanguage(language="qaa_Latn", share=0.6)
    train(tuned(init, choice), out.path, until=1, progress=no_progress)
    chosen = Run.from_yaml(out.config.read_text()).trainable.experts
    usage = read_usage(base.usage)
    column = usage.languages.index("qaa_Latn")
    for layer in usage.layers:
        own = layer.counts[:, column]
        kept = own[list(chosen[layer.layer])]
        assert kept.sum() >= 0.6 * own.sum() > kept.sum() - kept.min()
    merge_adapter(out)
    before, after = read_tensors(base.model), read_tensors(out.model)
    name = "encoder.0.feed_forward.inner.experts.up"
    changed = {e for e in range(4) if not torch.equal(before[name][e], after[name][e])}
    assert changed == set(chosen["encoder.0"])
    with pytest.raises(ConfigError, match=r"language=xxx: .*usage\.json counts"):
        train(tuned(init, choice.replace(language="xxx")), tmp_path / "no", progress=no_progress)


def test_spiel_moves_its_values_to_the_largest_gradients_and_seeds_their_moments():
    choice = SPIEL.replace(select_steps=1)
    trainer = tiny_trainer(tiny_run(trainable=choice, clip_norm=1e9))
    dense = Transformer(trainer.run.model)
    weights = {n: p for n, p in trainer.model.named_parameters() if not is_of_adapter(n)}
    dense.load_state_dict(weights, strict=False)  # a tied table has a second name
    output = dense(batch := next(TinyStream()))
    loss = dense.loss(output).total / batch.num_predicted
    (loss + sum(sum(r.losses.values()) for r in output.records)).backward()
    hook = selection_hooks(trainer)[0]
    training_loop(trainer, hooks=[hook], until=1)
    assert not hook.tensors(trainer.world)
    adapter, state = export_weights(trainer.model), trainer.optimizer.state
    for name, weight in dense.named_parameters():
        if (index := adapter.get(adapter_name(name, "index"))) is None:
            continue
        flat, delta = weight.grad.flatten(-2), adapter_name(name, "delta")
        wanted = flat.abs().topk(index.shape[-1]).indices.sort(-1).values
        assert index.long().sort(-1).values.equal(wanted), name
        assert not adapter[delta].any()
        moment = state[trainer.model.get_parameter(delta)]["exp_avg"] / (1 - 0.9)
        torch.testing.assert_close(moment, flat.gather(-1, index.long()), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("after", [0, 1])
def test_a_skipped_attempt_leaves_nothing_in_the_window_of_spiel(after):
    trainer = tiny_trainer(tiny_run(trainable=SPIEL))
    hook = selection_hooks(trainer)[0]
    training_loop(trainer, hooks=[hook], until=after)
    hook.before_run(trainer)
    before = {name: tensor.clone() for name, tensor in hook.tensors(trainer.world).items()}
    attempt = trainer.retry_queue.next_attempt(trainer.data.state())
    trainer.objective.forward_backward(trainer.parallel_model, batches=(next(TinyStream()),))
    assert hook.tensors(trainer.world).keys() > before.keys() or after
    trainer._skip_update(attempt, reason="a spike")
    found = hook.tensors(trainer.world)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    assert not any(window.step_sum.any() for window in hook._windows.values())


def test_the_values_that_are_trained_and_saved_are_the_budget():
    model, counted = Transformer(tiny_model_config()), 0
    SPARSE.attach(model)
    for name in adaptable_matrices(model):
        shape = model.get_parameter(name).shape
        experts = shape[0] if len(shape) == 3 else 1
        counted += experts * round(0.05 * shape[-2] * shape[-1])
    named = model.named_parameters()
    assert sum(p.numel() for n, p in named if SPARSE.includes(n)) == counted


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
    pinned = Run.from_yaml(RunDir(out).config.read_text()).initial_weights
    with pytest.raises(CheckpointError, match=r"trained beside other weights"):
        pinned.replace(path=str(other)).pinned()  # its record is still that of the former file
    adopt_files(RunDir(other))
    moved = tuned(init).replace(initial_weights=WeightsOfRun(path=str(other)))
    with pytest.raises(CheckpointError, match=r"adapters are for weights with the hash"):
        train(moved, out, resume=ResumeLatest(), progress=no_progress)
    with pytest.raises(CheckpointError, match=r"needs? no merging"):
        merge_adapter(RunDir(other))


def test_what_adapters_cannot_do_is_refused_by_name():
    sharded = ParallelPlan(data=2, expert=2, zero=2)
    for choice, plan, axes in (
        (SPIEL, sharded, r"expert=2(.|\n)*zero=2"),
        (SPIEL, ParallelPlan(data=2, zero=1), "zero=1: .* set zero to 0"),
        (SPARSE, ParallelPlan(data=1, tensor=2), "tensor=2"),
    ):
        with pytest.raises(ConfigError, match=axes):
            check_run(tiny_run(trainable=choice, parallel=ParallelConfig(plan=plan)))
    with pytest.raises(ConfigError, match=r"trainable=LoRA .*--init MODEL"):
        check_run(tiny_run(trainable=LORA))
    with pytest.raises(ConfigError, match=r"select_steps=5 to be at most every=4"):
        SpIEL(every=4, select_steps=5)
    for experts in ({"encoder.9": (0,)}, {"encoder.0": (0, 99)}, {"encoder.0": (1, 1)}):
        unknown = tiny_run(trainable=ROWS.replace(experts=experts))
        with pytest.raises(ConfigError, match=r"trainable\.experts\.encoder.*encoder\.0 \(0 to"):
            check_run(unknown)
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
