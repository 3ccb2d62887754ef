"""Loss-free balancing: the bias changes the selection and no weights, and is saved."""

from pathlib import Path

import torch

from moesaic.checkpoint.full_checkpoint import load_checkpoint, save_checkpoint
from moesaic.moe.batch_group import SingleRankBatch
from moesaic.moe.config import MoE
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_selection import TopK
from moesaic.moe.layer import moe_layers
from moesaic.moe.router import Router
from moesaic.moe.router_context import RouterState, RoutingStats, TokenContext
from moesaic.moe.router_gate import LayerIndex
from moesaic.testing.tiny_models import tiny_model_config, tiny_run, tiny_trainer

FREE = MoE(experts=4, select=TopK(k=2), balance=(BiasUpdate(rate=0.05),))


def route(router, x):
    return router(
        x,
        context=TokenContext.unbatched(len(x)),
        router_state=RouterState(),
        batch_group=SingleRankBatch(),
    )


def made(config=FREE):
    router = Router(config, dim=8, layer_index=LayerIndex("test.0"))
    torch.nn.init.normal_(router.gate.weight)
    return router


def test_the_bias_moves_by_the_sign_of_the_missing_load():
    sums = torch.zeros(17, dtype=torch.float64)
    sums[:4] = torch.tensor([10, 4, 6, 4])  # mean 6
    state = BiasUpdate(rate=0.1).update_state(
        {"bias": torch.ones(4)}, RoutingStats.from_vector(sums)
    )
    torch.testing.assert_close(state["bias"], torch.tensor([0.9, 1.1, 1.0, 1.1]))


def test_the_bias_changes_the_selection_and_not_the_weights():
    router, x = made(), torch.randn(50, 8)
    router.get_buffer("balance0_bias").copy_(torch.tensor([-99.0, -99.0, 0.0, 0.0]))
    for training in (True, False):
        routed = route(router.train(training), x)
        assert routed.routing.load().tolist() == [0, 0, 50, 50]
        want = (x @ router.gate.weight.t())[:, 2:].softmax(-1)
        weight = torch.zeros(50, 4).scatter(
            1, routed.routing.expert.view(50, 2), routed.routing.weight.view(50, 2)
        )
        torch.testing.assert_close(weight[:, 2:], want)


def test_an_uneven_load_evens_out_step_by_step():
    router = made()
    with torch.no_grad():
        router.gate.weight[0].add_(1.0)  # expert 0 is everyone's
    most = []
    for step in range(120):
        torch.manual_seed(step)
        routed = route(router, torch.randn(400, 8) + 1)
        router.accumulate_stats(routed.stats_vector)
        router.update_rules()
        most.append(float(routed.routing.load().max()) / 200)
    assert most[0] > 1.6
    assert sum(most[-10:]) / 10 < 1.2


def test_the_loss_is_zero_and_has_no_gradient():
    router, x = made(), torch.randn(50, 8)
    (loss,) = route(router, x).losses.values()
    (grad,) = torch.autograd.grad(loss, router.gate.weight)
    assert loss == 0
    assert (grad == 0).all()


def test_the_bias_is_updated_in_training_and_saved_in_checkpoints(tmp_path: Path):
    run = tiny_run(model=tiny_model_config(moe=FREE), steps=4, gradient_accumulation_steps=2)
    trainer = tiny_trainer(run)
    for _ in range(3):
        trainer.train_step()
    biases = [
        layer.router.get_buffer("balance0_bias").clone() for layer in moe_layers(trainer.model)
    ]
    assert len(biases) == 2
    assert all((bias != 0).any() for bias in biases)
    save_checkpoint(tmp_path, trainer.snapshot())
    again = tiny_trainer(run)
    again.restore(load_checkpoint(tmp_path))
    for layer, bias in zip(moe_layers(again.model), biases, strict=True):
        found = layer.router.get_buffer("balance0_bias")
        assert found.dtype == torch.float32
        assert torch.equal(found, bias)
