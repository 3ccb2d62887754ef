"""``moesaic.MoE`` is the trainer's layer as a plain module."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import moesaic
from moe.variants import LAYER_PARTS, NULL_EXPERTS, SELECTS
from moesaic.core.errors import ConfigError
from moesaic.distributed.forked_ranks import run_on_ranks
from moesaic.model.transformer import Transformer
from moesaic.moe.auxiliary_losses import GlobalBatchBalance, RouterZLoss, SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.cross_layer_router import RecurrentRouting
from moesaic.moe.expert_bias import BiasUpdate
from moesaic.moe.expert_capacity import Capacity
from moesaic.moe.expert_selection import Hash, SigmoidTopK, SwitchTop1, TopK
from moesaic.moe.layer import moe_layers
from moesaic.moe.router_noise import Jitter
from moesaic.testing.tiny_models import random_batch, tiny_model_config

DIM = 16


def module(router="top2", **rules):
    torch.manual_seed(0)
    return moesaic.MoE(DIM, 24, 4, router, **rules)


def tokens(*shape, seed=1):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def gradients(layer):
    return [p.grad.clone() for p in layer.parameters()]


def test_the_layer_in_the_trainer_computes_the_same_bits():
    rules = {"select": SwitchTop1(), "balance": (SwitchBalance(), RouterZLoss())}
    rules |= {"noise": Jitter(), "limit": Capacity(factor=1.0, minimum=0)}
    torch.manual_seed(0)
    model = Transformer(tiny_model_config(moe=MoE(experts=4, **rules)))
    (inner, *_), seen = list(moe_layers(model)), {}

    def keep(_module, args, kwargs, output):
        args[0].retain_grad()
        output.out.retain_grad()
        seen.update(x=args[0], context=kwargs["context"], output=output)

    inner.register_forward_hook(keep, with_kwargs=True)
    output = model(random_batch(6, seed=0))
    losses = sum(sum(r.losses.values()) for r in output.records)
    (model.loss(output).total + losses).backward()

    select = rules.pop("select")
    layer = moesaic.MoE(DIM, 32, 4, select, **rules)
    layer.layer.load_state_dict(inner.state_dict())
    layer.layer.name = inner.name  # which random numbers depend on
    x = seen["x"].detach().requires_grad_()
    y, named = layer(x, context=seen["context"], return_losses=True)
    assert torch.equal(y, seen["output"].out)
    assert named == seen["output"].record.losses
    torch.autograd.backward([y, layer.aux_loss], [seen["output"].out.grad, torch.ones(())])
    assert torch.equal(x.grad, seen["x"].grad)
    theirs = dict(inner.named_parameters())
    for name, parameter in layer.layer.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name


@pytest.mark.parametrize("select", SELECTS)
def test_every_selection_rule_trains(select):
    layer = module(SELECTS[select], null_experts=NULL_EXPERTS.get(select, "NoNullExperts()"))
    x, ids = tokens(3, 5).requires_grad_(), torch.arange(15).view(3, 5)
    y = layer(x, token_ids=ids)
    (y.square().sum() + layer.aux_loss).backward()
    assert y.shape == x.shape
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in layer.layer.experts.parameters()) == 2


@pytest.mark.parametrize("part", LAYER_PARTS)
def test_every_part_of_a_layer_can_be_added(part):
    layer = module("top2", bias=True, **LAYER_PARTS[part])
    assert layer(tokens(5)).shape == (5, DIM)


def test_any_leading_shape_gives_the_same_tokens_the_same_output():
    layer, x = module().eval(), tokens(2, 3, 5)
    whole = layer(x)
    torch.testing.assert_close(layer(x.view(30, DIM)).view_as(x), whole)
    torch.testing.assert_close(layer(x[1, 2, 4]), whole[1, 2, 4])
    assert layer(x[:, :, :0]).shape == (2, 3, 0, DIM)


def test_short_names_of_routers():
    assert module("top1").config.select == SwitchTop1()
    assert module("top3").config.select == TopK(k=3)
    assert module("sigmoid-top2").config.select == SigmoidTopK(k=2)
    assert module("TopK(k=2, normalise=none)").config.select == TopK(k=2, normalise="none")
    assert module("expert-choice").config.select.needs_whole_rows


@pytest.mark.parametrize(
    ("router", "rules", "named"),
    [
        ("top5", {}, "at least 5 experts"),
        ("best", {}, "best"),
        ("top2", {"cross_layer": RecurrentRouting()}, "one layer"),
        ("top2", {"balanse": ()}, "balance"),
    ],
)
def test_rules_that_do_not_fit_are_named(router, rules, named):
    with pytest.raises(ConfigError, match=named):
        module(router, **rules)


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"\[2, 3\], expected \[..., 16\]"),
        ({"mask": torch.ones(3, 5)}, TypeError, "float32, expected bool"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"expected that of the tokens"),
    ],
)
def test_wrong_inputs_are_named(given, error, named):
    with pytest.raises(error, match=named):
        module()(**{"x": tokens(3, 5)} | given)


def test_hash_routing_asks_for_ids():
    with pytest.raises(TypeError, match="token_ids"):
        module(Hash(), balance=())(tokens(5))


def test_masked_tokens_take_no_part():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    layer, x = module("top1", balance=(SwitchBalance(),), limit=Capacity(minimum=0)), tokens(2, 3)
    x.requires_grad_()
    torch.manual_seed(5)
    y, losses = layer(x, mask=mask, return_losses=True)
    assert not bool(y[~mask].any())
    y.square().sum().backward()
    assert not bool(x.grad[~mask].any())
    torch.manual_seed(5)
    noise = torch.where(mask[..., None], x.detach(), torch.full_like(x, 9.0))
    other, same = layer(noise, mask=mask, return_losses=True)
    assert torch.equal(other, y)
    assert same == losses


def test_losses_on_request():
    layer = module(balance=(SwitchBalance(), RouterZLoss()))
    y, losses = layer(tokens(7), return_losses=True)
    assert y.requires_grad
    assert set(losses) == {"balance", "z"}
    assert torch.equal(layer.aux_loss, losses["balance"] + losses["z"])
    layer.eval()(tokens(7))
    assert float(layer.aux_loss) == 0
    model = torch.nn.Sequential(module(), torch.nn.Linear(DIM, DIM), module())
    model(tokens(7))
    assert torch.equal(moesaic.aux_loss(model), model[0].aux_loss + model[2].aux_loss)
    assert float(moesaic.aux_loss(torch.nn.Linear(2, 2))) == 0


def test_a_bias_follows_the_tokens_since_the_last_step():
    layer = module(balance=(BiasUpdate(rate=0.5),))
    for seed in (1, 2):  # two micro-batches of one step
        layer(tokens(40, seed=seed)).sum().backward()
    counted = sum(_load(layer, tokens(40, seed=seed)) for seed in (1, 2))
    moesaic.update_rules(torch.nn.Sequential(layer))
    bias = layer.layer.router.rule_state("balance0")["bias"]
    assert torch.equal(bias, 0.5 * (counted.float().mean() - counted).sign())
    assert not bool(layer.layer.router.stats_sum.any())


def _load(layer, x):
    with torch.no_grad():
        return (
            copy.deepcopy(layer)
            .eval()
            .layer.router.gate(x, router_state=None)
            .logits.topk(2)
            .indices.flatten()
            .bincount(minlength=4)
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    terms = (BiasUpdate(), GlobalBatchBalance(weight=0.3))
    plain = module(balance=terms, noise=Jitter(), limit=Capacity(minimum=0))
    again = copy.deepcopy(plain)
    for seed in (1, 2):
        x = tokens(2, 9, seed=seed).requires_grad_()
        torch.manual_seed(7)
        y, losses = plain(x, return_losses=True)
        (y.square().sum() + sum(losses.values())).backward()
        torch.manual_seed(7)
        y, loss = checkpoint(lambda x: _both(again, x), x, use_reentrant=reentrant)
        (y.square().sum() + loss).backward()
    assert all(map(torch.equal, gradients(plain), gradients(again)))
    for layer in (plain, again):
        layer.update_rules()
    assert all(map(torch.equal, plain.state_dict().values(), again.state_dict().values()))


def _both(layer, x):
    y, losses = layer(x, return_losses=True)
    return y, sum(losses.values())


def test_a_loss_without_a_graph_is_refused():
    layer, x = module(), tokens(5).requires_grad_()
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        _ = layer.aux_loss


def test_a_layer_can_be_saved_copied_and_moved():
    layer = module(balance=(BiasUpdate(),), limit=Capacity())
    layer(tokens(30)).sum().backward()
    layer.update_rules()
    layer(tokens(30))
    twin, fresh = (
        copy.deepcopy(layer),
        moesaic.MoE(DIM, 24, 4, balance=(BiasUpdate(),), limit=Capacity()),
    )
    fresh.load_state_dict(layer.state_dict())
    x = tokens(9)
    for other in (twin, fresh):
        assert torch.equal(other.eval()(x), layer.eval()(x))
    assert twin.layer.router.gate.weight is not layer.layer.router.gate.weight
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_compiled_layer_is_one_graph_and_computes_the_same():
    eager = module(balance=(SwitchBalance(), BiasUpdate()), limit=Capacity(minimum=0))
    layer, x = copy.deepcopy(eager), tokens(2, 9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs = []
    # otherwise a graph differentiates in the autocast of its forward pass, also the router
    with torch._functorch.config.patch(backward_pass_autocast="off"):
        for call, own in ((eager, eager), (compiled, layer)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                torch.manual_seed(3)
                y = call(x)
            (y.float().square().sum() + own.aux_loss).backward()
            outputs.append(y)
    assert torch.equal(*outputs)
    assert y.dtype == torch.bfloat16
    assert torch.equal(eager.aux_loss, layer.aux_loss)
    for a, b in zip(gradients(eager), gradients(layer), strict=True):
        torch.testing.assert_close(a, b)
    for own in (eager, layer):
        own.update_rules()
    assert all(map(torch.equal, eager.buffers(), layer.buffers()))


def test_what_is_not_one_graph_compiles_with_graph_breaks():
    layer, x = module("expert-choice", expert="LoRAExpert(rank=2)"), tokens(2, 9)
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    outputs = []
    for call in (layer, torch.compile(layer, backend="eager")):
        torch.manual_seed(3)
        outputs.append(call(x, mask=mask))
    torch.testing.assert_close(*outputs)


def test_data_parallel_ranks_share_gradients_and_rules():
    whole = module(balance=(SwitchBalance(weight=0.0), BiasUpdate(rate=0.5)))
    x = tokens(2, 10)
    whole(x).square().sum().backward()
    whole.update_rules()

    def work():
        rank = torch.distributed.get_rank()
        layer = module(balance=(SwitchBalance(weight=0.0), BiasUpdate(rate=0.5)))
        parallel = DistributedDataParallel(layer)
        parallel(x[rank]).square().sum().backward()
        layer.update_rules()
        bias = layer.layer.router.rule_state("balance1")["bias"]
        return [g.numpy() for g in gradients(layer)], bias.numpy()

    for grads, bias in run_on_ranks(2, work):
        for g, one in zip(grads, gradients(whole), strict=True):
            torch.testing.assert_close(torch.from_numpy(g) * 2, one)
        assert bias.tolist() == whole.layer.router.rule_state("balance1")["bias"].tolist()


def test_a_step_of_a_plain_loop_lowers_the_loss():
    layer, x = module("top1", balance=(SwitchBalance(),)), tokens(64)
    target = F.gelu(x.flip(-1))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        (loss + layer.aux_loss).backward()
        optimizer.step()
        layer.update_rules()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_importing_the_package_does_not_import_torch():
    code = "import moesaic, sys; moesaic.__all__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
