"""bfloat16 parameters: what a rank holds and saves, what resumes, and what every plan agrees on."""

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from head_cases import HEADS, head_batch
from model.samples import VARIANTS, batch_for
from moesaic.checkpoint.full_checkpoint import find_latest_checkpoint, load_checkpoint
from moesaic.core.shapes import Tensor
from moesaic.distributed.world import SingleProcess
from moesaic.model.parameter_flop_count import BatchDims
from moesaic.model.transformer import Transformer
from moesaic.moe import experts as experts_module
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.feed_forward import FeedForwardConfig, SwiGLU
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.moe_kernel import UnfusedMoEKernel
from moesaic.optim.master_weights import Float32Master, MasterWeights, StochasticRounding
from moesaic.optim.optimizer import AdamW, Muon, Optimizer
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallel_model import ParallelModel
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.parameter_inventory import ParameterInventory
from moesaic.parallel.precision import BFloat16, BFloat16Autocast, Float32, Precision
from moesaic.planner.cost_settings import CostSettings
from moesaic.planner.step_memory import state_bytes
from moesaic.testing.tiny_models import random_batch, tiny_model_config, tiny_run, tiny_trainer
from moesaic.train.loop import training_loop
from moesaic.train.trainer import Trainer
from moesaic.train.training_hooks import CheckpointHook


def _model(precision: Precision, config=None) -> ParallelModel:
    torch.manual_seed(0)
    model = Transformer(config or tiny_model_config())
    parallel, world = ParallelConfig(), SingleProcess()
    return parallelize(model, parallel=parallel, world=world, precision=precision)


def _backward(parallel_model: ParallelModel, batch, precision: Precision) -> Tensor:
    model = parallel_model.model
    with precision.autocast(torch.device("cpu")):
        output = model(batch)
        loss = model.loss(output).total
    torch.stack([loss, *(v for r in output.records for v in r.losses.values())]).sum().backward()
    parallel_model.sum_gradients()
    return loss.detach()


PARTS = ("recurrent", "decoupled", "on-tag", "relative-bias", "switch-layernorm-sinusoidal-bias")
CASES = {
    name: (config, lambda c=config: batch_for(c))
    for name, config in VARIANTS.items()
    if name.startswith("mixer") or name in PARTS  # laws train every MoE layer
}
CASES |= {f"head-{n}": (config, lambda n=n: head_batch(n)) for n, config in HEADS.items()}


def test_every_mixer_router_and_head_computes_in_bfloat16():
    for name, (config, batch) in CASES.items():
        exact = _model(Float32(), config)
        with torch.no_grad():
            want = exact.model.loss(exact.model(batch())).total
        narrow = _model(BFloat16(), config)
        loss = _backward(narrow, batch(), BFloat16())
        assert loss.dtype == torch.float32, name
        assert torch.allclose(loss, want, rtol=0.02), name
        grads = [p.grad for p in narrow.model.parameters()]
        assert all(g.dtype == torch.bfloat16 and bool(g.isfinite().all()) for g in grads), name


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
@pytest.mark.parametrize("precision", [BFloat16(), BFloat16Autocast()], ids=repr)
def test_no_cast_copy_of_expert_weights_is_saved_for_backward(precision, unfused, monkeypatch):
    if unfused:
        kernel = UnfusedMoEKernel(SequentialGEMM())
        monkeypatch.setattr(experts_module, "select_moe_kernel", lambda *_, **__: kernel)
    moe = MoE(experts=3, select=TopK(k=2), balance=())
    feed = FeedForwardConfig(hidden=24, activation=SwiGLU())
    parallel_model = _model(precision, tiny_model_config(moe=moe).replace(feed_forward=feed))
    held = {p.untyped_storage().data_ptr() for p in parallel_model.model.parameters()}
    shapes = {tuple(p.shape) for p in parallel_model.model.parameters() if p.dim() == 3}
    saved: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) in shapes:
            saved.append(tensor.untyped_storage().data_ptr() in held)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _backward(parallel_model, random_batch(4, seed=0), precision)
    assert saved
    assert all(saved)


MASTERS = (Float32Master(), StochasticRounding())


@pytest.mark.parametrize("gradients", ["bfloat16", "float32"])
@pytest.mark.parametrize("master", MASTERS, ids=repr)
@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_bytes_of_weights_gradients_and_states_are_the_closed_form(
    optimizer: Optimizer, master: MasterWeights, gradients: str
):
    precision = BFloat16(gradients=gradients, master=master)
    parallel_model = _model(precision)
    model = parallel_model.model
    built = optimizer.build(
        model.named_parameters(), kinds=model.parameter_kinds(), master_weights=master
    )
    _backward(parallel_model, random_batch(4, seed=0), precision)
    built.step()
    values = sum(p.numel() for p in model.parameters())
    moments = {"exp_avg", "exp_avg_sq", "momentum"}
    states = [(slot, t) for s in built.state.values() for slot, t in s.items()]
    steps = sum(t.nbytes for slot, t in states if slot == "step")
    adamw = sum(p.numel() for p in model.parameters() if "exp_avg" in built.state[p])
    weights = sum(p.nbytes for p in model.parameters())
    grads = sum(p.grad.nbytes for p in model.parameters())
    held = sum(t.nbytes for _, t in states)
    assert {slot for slot, _ in states} <= moments | {"master", "step"}
    assert weights == 2 * values
    assert grads == (4 if gradients == "float32" else 2) * values
    assert held == 4 * values + 4 * adamw + steps + master.bytes_per_value * values
    parameters = ParameterInventory(tiny_model_config()).on_rank(ParallelConfig(), world=1)
    sizes = BatchDims(rows=1, source=4, target=4)
    settings = CostSettings(
        model=tiny_model_config(), precision=precision, optimizer=optimizer, sizes=sizes
    )
    forecast = state_bytes(parameters, settings)
    assert (forecast.weights, forecast.gradients, forecast.states) == (weights, grads, held)


def test_gradients_add_up_in_the_stated_dtype():
    sums, added = {}, 2.0**-9
    for gradients in ("bfloat16", "float32"):
        model = _model(BFloat16(gradients=gradients)).model
        weight = model.decoder_norm.weight
        for step in range(9):
            (weight * (added if step else 1.0)).sum().backward()
        sums[gradients] = float(weight.grad[0])
    assert sums["float32"] == 1 + 8 * added
    assert sums["bfloat16"] == 1  # each sum was rounded back


def _trained(precision: Precision, folder: Path, *, until: int, resume: Path | None) -> Trainer:
    trainer = tiny_trainer(tiny_run(steps=6, precision=precision))
    if resume is not None:
        trainer.load_checkpoint(resume)
    training_loop(trainer, hooks=[CheckpointHook(folder, flush=lambda: None)], until=until)
    return trainer


@pytest.mark.parametrize("master", MASTERS, ids=repr)
def test_a_run_in_bfloat16_resumes_bit_for_bit_and_in_any_precision(master, tmp_path):
    precision = BFloat16(master=master)
    whole = _trained(precision, tmp_path / "whole", until=6, resume=None)
    _trained(precision, tmp_path / "half", until=3, resume=None)
    saved = find_latest_checkpoint(tmp_path / "half").path
    again = _trained(precision, tmp_path / "again", until=6, resume=saved)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    weights = load_checkpoint(saved).files["model"]
    for other in (Float32(), BFloat16(master=StochasticRounding()), BFloat16()):
        resumed = tiny_trainer(tiny_run(steps=6, precision=other))
        resumed.load_checkpoint(saved)
        for name, parameter in resumed.model.named_parameters():
            held = resumed.optimizer.state[parameter].get("master", parameter)
            assert torch.equal(held, weights[name].to(held.dtype)), name
            assert torch.equal(parameter, weights[name].to(parameter.dtype)), name
