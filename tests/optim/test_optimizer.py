"""Optimizers equal their definitions and group parameters by kind."""

import pytest
import torch
from torch import nn

from moesaic.core.config import Config
from moesaic.core.errors import ConfigError
from moesaic.optim.optimizer import AdamW, MatchRMSAdamW, Muon, Optimizer, Spectral

SHAPES = {
    "embed.weight": ("embedding", (50, 16)),
    "norm.weight": ("norm", (16,)),
    "up.bias": ("bias", (24,)),
    "expert.bias": ("bias", (4, 24)),
    "up.weight": ("matrix", (24, 16)),
    "down.weight": ("matrix", (16, 24)),
    "expert.up": ("expert", (4, 16, 24)),
    "expert.down": ("expert", (4, 24, 16)),
    "router.weight": ("router", (4, 16)),
}
KINDS = {name: kind for name, (kind, _) in SHAPES.items()}


def parameters(dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    return {
        n: nn.Parameter(torch.randn(s, generator=make).to(dtype)) for n, (_, s) in SHAPES.items()
    }


def set_gradients(params, *, seed):
    make = torch.Generator().manual_seed(seed)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=make).to(p.dtype)


def run(params, optimizer, steps=4):
    for step in range(steps):
        set_gradients(params, seed=step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_adamw_equals_torchs_adamw():
    ours, theirs = parameters(), parameters()
    config = AdamW(lr=0.01, weight_decay=0.1)
    run(ours, config.build(ours.items(), kinds=KINDS))
    decayed = [p for n, p in theirs.items() if KINDS[n] not in ("norm", "bias")]
    plain = [p for n, p in theirs.items() if KINDS[n] in ("norm", "bias")]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    run(theirs, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), weight_decay=0.1))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def plain_muon_step(w, grad, buffer, *, lr, decay, momentum, scale, out_in):
    """The published update of one matrix, in float64, straight from the text."""
    buffer.mul_(momentum).add_((1 - momentum) * grad)
    x = (1 - momentum) * grad + momentum * buffer
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
    return w * (1 - lr * decay) - lr * scale(*out_in) * x


@pytest.mark.parametrize("scale", [MatchRMSAdamW(), Spectral()], ids=["match-adamw", "spectral"])
def test_muon_equals_its_definition_matrix_by_matrix(scale):
    params = parameters()
    plain = {n: p.detach().double() for n, p in params.items() if "muon" in rule_of(n)}
    buffers = {n: torch.zeros_like(p) for n, p in plain.items()}
    optimizer = Muon(lr=0.02, weight_decay=0.1, scale=scale).build(params.items(), kinds=KINDS)
    settings = {"lr": 0.02, "decay": 0.1, "momentum": 0.95, "scale": scale}
    for step in range(3):
        set_gradients(params, seed=step)
        optimizer.step()
        for name, w in plain.items():
            grad = params[name].grad.double()
            # a matrix is stored [out, in], an expert [in, out]
            settings["out_in"] = w.shape[:-3:-1] if w.ndim == 3 else w.shape
            for i in range(len(w)) if w.ndim == 3 else [...]:
                w[i] = plain_muon_step(w[i].clone(), grad[i], buffers[name][i], **settings)
    assert set(plain) == {"up.weight", "down.weight", "expert.up", "expert.down"}
    for name, w in plain.items():
        torch.testing.assert_close(params[name].double(), w, rtol=1e-3, atol=2e-5)


def rule_of(name, config=None):
    params = parameters()
    optimizer = (config or Muon()).build(params.items(), kinds=KINDS)
    return next(g["name"] for g in optimizer.param_groups if name in g["param_names"])


@pytest.mark.parametrize("config", [AdamW(weight_decay=0.5), Muon(adamw=AdamW(weight_decay=0.5))])
def test_norms_and_biases_are_not_decayed(config):
    params = parameters()
    optimizer = config.build(params.items(), kinds=KINDS)
    for group in optimizer.param_groups:
        assert (group["weight_decay"] == 0) == (group["name"] in ("adamw/norm", "adamw/bias"))


def test_expert_biases_are_updated_by_adamw_even_with_the_kind_expert():
    params = parameters()
    optimizer = Muon().build(params.items(), kinds=KINDS | {"expert.bias": "expert"})
    names = {n: g["name"] for g in optimizer.param_groups for n in g["param_names"]}
    assert names["expert.bias"] == "adamw/expert"
    assert names["expert.up"] == "muon/expert"


@pytest.mark.parametrize("config", [AdamW(lr=0.01), Muon(lr=0.01, adamw=AdamW(lr=0.02))])
def test_a_schedule_multiplies_the_base_rate_of_every_group(config):
    params = parameters()
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = config.build(params.items(), kinds=KINDS)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.0
    run(params, optimizer, steps=1)
    for name in params:
        torch.testing.assert_close(params[name], before[name], rtol=0, atol=0)


@pytest.mark.parametrize("config", [AdamW(lr=1e-4), Muon(lr=1e-4, adamw=AdamW(lr=1e-4))])
def test_bfloat16_parameters_accumulate_updates_too_small_for_their_type(config):
    narrow, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    wide = {n: nn.Parameter(p.detach().float()) for n, p in wide.items()}
    optimizers = [config.build(p.items(), kinds=KINDS) for p in (narrow, wide)]
    for step in range(20):
        set_gradients(narrow, seed=step % 2)
        for name in narrow:
            wide[name].grad = narrow[name].grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for name in narrow:
        torch.testing.assert_close(narrow[name], wide[name].bfloat16(), rtol=0, atol=0)
    for state in optimizers[0].state.values():
        assert all(t.dtype == torch.float32 for t in state.values())


def test_a_parameter_without_a_gradient_is_left_alone():
    params = parameters()
    optimizer = Muon().build(params.items(), kinds=KINDS)
    set_gradients(params, seed=0)
    params["expert.up"].grad = None
    before = params["expert.up"].detach().clone()
    optimizer.step()
    torch.testing.assert_close(params["expert.up"], before, rtol=0, atol=0)


@pytest.mark.parametrize("kinds", [{}, {"w": "weights"}])
def test_a_parameter_of_no_known_kind_is_refused_by_name(kinds):
    with pytest.raises(ValueError, match=r"w: kind is .* expected one of embedding"):
        AdamW().build([("w", nn.Parameter(torch.ones(2)))], kinds=kinds)


def test_frozen_parameters_are_left_out():
    params = parameters()
    params["embed.weight"].requires_grad_(False)
    optimizer = AdamW().build(params.items(), kinds=KINDS)
    assert "embed.weight" not in [n for g in optimizer.param_groups for n in g["param_names"]]


def test_a_zero_gradient_gives_no_nan_in_muon():
    params = parameters()
    optimizer = Muon().build(params.items(), kinds=KINDS)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(p.isfinite().all() for p in params.values())


class Holder(Config):
    optimizer: Optimizer


def test_members_are_parsed_from_text():
    plain = {"kind": "Muon", "scale": "Spectral", "adamw": {"lr": 0.1}}
    config = Holder.from_dict({"optimizer": plain})
    assert config.optimizer == Muon(scale=Spectral(), adamw=AdamW(lr=0.1))
    assert Holder.from_yaml(config.to_yaml()) == config
    with pytest.raises(ConfigError, match=r"optimizer\.lr: found -1"):
        Holder.from_dict({"optimizer": {"kind": "AdamW", "lr": -1}})


FUSED = {
    "qkv": ("matrix", (6, 3, 3), (12, 8)),  # queries, keys and values of grouped-query attention
    "up": ("expert", (5, 5), (4, 8, 10)),  # gate and value
}


@pytest.mark.parametrize("scale", [MatchRMSAdamW(), Spectral()], ids=["match-adamw", "spectral"])
@pytest.mark.parametrize("name", FUSED)
def test_muon_updates_the_maps_of_a_fused_matrix_as_separate_matrices(name, scale):
    kind, widths, shape = FUSED[name]
    dim = 0 if kind == "matrix" else -1
    make = torch.Generator().manual_seed(0)
    whole = nn.Parameter(torch.randn(shape, generator=make))
    parts = {f"{name}.{i}": nn.Parameter(p.clone()) for i, p in enumerate(whole.split(widths, dim))}
    config = Muon(lr=0.1, scale=scale)
    fused = config.build([(name, whole)], kinds={name: kind})
    fused.fused_outputs = {name: widths}
    apart = config.build(parts.items(), kinds=dict.fromkeys(parts, kind))
    for _ in range(3):
        whole.grad = torch.randn(shape, generator=make)
        for part, grad in zip(parts.values(), whole.grad.split(widths, dim), strict=True):
            part.grad = grad.clone()
        fused.step()
        apart.step()
    torch.testing.assert_close(whole, torch.cat(list(parts.values()), dim))
    other = nn.Parameter(whole.detach().clone())
    plain = config.build([(name, other)], kinds={name: kind})
    other.grad = whole.grad
    before = whole.detach().clone()
    fused.step()
    plain.step()
    # as one matrix it would be another update
    assert torch.cosine_similarity((whole - before).flatten(), (other - before).flatten(), 0) < 0.95
