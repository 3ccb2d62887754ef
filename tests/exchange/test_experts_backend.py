"""transformers' models on our kernels: outputs and gradients of their own computation."""

import copy

import pytest
import torch
from transformers_models import MODELS, TheirModel

from moesaic.core.errors import ConfigError
from moesaic.exchange.experts_backend import register_experts_backend

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
NAMES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
ROWS = torch.randint(0, 96, (3, 11), generator=torch.Generator().manual_seed(0))


def trained(model, implementation):
    """The logits of a model and the gradients of all its weights."""
    model.set_experts_implementation(implementation)
    logits = model(ROWS).logits
    model.zero_grad()
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_their_models_have_the_same_logits_and_gradients_on_our_kernels(name):
    model = MODELS[name].build()
    wanted, gradients = trained(copy.deepcopy(model), "eager")
    found, ours = trained(model, register_experts_backend())
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    for key, gradient in gradients.items():
        assert (ours[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key


def test_one_line_is_enough_also_to_generate_train_and_save(tmp_path):
    model = MODELS["mixtral"].build()
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ROWS, **how)
    model.set_experts_implementation(register_experts_backend())
    assert model.generate(ROWS, **how).equal(wanted)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moesaic"
    )
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in before.items())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(ROWS).logits.square().mean().backward()
    optimizer.step()
    assert not model.state_dict()["model.layers.0.mlp.experts.down_proj"].equal(
        before["model.layers.0.mlp.experts.down_proj"]
    )


def test_experts_that_our_kernels_do_not_compute_are_named():
    small = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
    }
    model = TheirModel("GptOss", small).build()
    model.set_experts_implementation(register_experts_backend())
    with pytest.raises(ConfigError, match="GptOssExperts has biases, alternating rows"):
        model(ROWS)
