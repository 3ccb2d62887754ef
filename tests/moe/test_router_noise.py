"""Router noise changes the input in training only, and within its bounds."""

import torch

from moe.variants import DIM, EXPERTS, layer, run
from moesaic.moe.config import MoE
from moesaic.moe.router_context import TokenContext
from moesaic.moe.router_noise import Jitter, NoRouterNoise

X = torch.rand(100, 8) + 1


def _noisy(noise):
    return noise.apply_to_input(X, TokenContext.unbatched(len(X)))


def test_jitter_stays_within_epsilon_and_changes_the_input():
    ratio = _noisy(Jitter(epsilon=0.1)) / X
    assert ratio.min() >= 0.9 - 1e-6
    assert ratio.max() <= 1.1 + 1e-6
    assert ratio.std() > 0.01
    assert _noisy(NoRouterNoise()) is X


def test_noise_is_applied_in_training_only():
    noisy = layer(MoE(experts=EXPERTS, noise=Jitter(epsilon=0.1)))
    plain = layer(MoE(experts=EXPERTS))
    plain.load_state_dict(noisy.state_dict())
    x = torch.randn(30, DIM)
    assert not torch.equal(run(noisy, x)[1].logits, run(plain, x)[1].logits)
    assert torch.equal(run(noisy.eval(), x)[1].logits, run(plain.eval(), x)[1].logits)
