"""A residual expert is mixed with the routed experts by learned weights."""

import torch

from moe.variants import DIM, EXPERTS, layer, run
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1
from moesaic.moe.shared_experts import ResidualExpert, SharedExperts

MIXTURE = MoE(experts=EXPERTS, select=SwitchTop1())
X = torch.randn(9, DIM)


def _mixed(made):
    alone = layer(MIXTURE)
    theirs = {k: v for k, v in made.state_dict().items() if not k.startswith("shared_experts")}
    alone.load_state_dict(theirs)
    return run(alone, X)[0]


def test_two_learned_weights_that_sum_to_one_mix_both_outputs():
    made = layer(MIXTURE.replace(shared_experts=ResidualExpert()))
    branch = made.shared_experts
    both = torch.softmax(X @ branch.coefficient.weight.t() + branch.coefficient.bias, -1)
    wanted = both[:, :1] * _mixed(made) + both[:, 1:] * branch.feed_forward(X)
    torch.testing.assert_close(run(made, X)[0], wanted, rtol=1e-4, atol=1e-4)


def test_with_even_weights_it_is_half_the_plain_sum():
    made = layer(MIXTURE.replace(shared_experts=ResidualExpert()))
    plain = layer(MIXTURE.replace(shared_experts=SharedExperts(number=1)))
    state = made.state_dict()
    plain.load_state_dict({k: v for k, v in state.items() if "coefficient" not in k})
    with torch.no_grad():
        made.shared_experts.coefficient.weight.zero_()
        made.shared_experts.coefficient.bias.zero_()
    torch.testing.assert_close(2 * run(made, X)[0], run(plain, X)[0], rtol=1e-4, atol=1e-4)


def test_the_weights_get_the_gradient_of_both_outputs():
    made = layer(MIXTURE.replace(shared_experts=ResidualExpert()))
    weigh = torch.randn(9, DIM)
    (run(made, X)[0] * weigh).sum().backward()
    branch = made.shared_experts
    both = torch.softmax(X @ branch.coefficient.weight.t() + branch.coefficient.bias, -1)
    gap = ((_mixed(made) - branch.feed_forward(X)) * weigh).sum(1)
    slope = both[:, 0] * both[:, 1] * gap
    wanted = torch.stack([slope.sum(), -slope.sum()])
    torch.testing.assert_close(branch.coefficient.bias.grad, wanted, rtol=1e-3, atol=1e-3)
