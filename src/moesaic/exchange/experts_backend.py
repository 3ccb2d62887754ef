"""Experts backend: models of Hugging Face transformers compute their experts with our kernels.

transformers (5.20 on) keeps the experts of a layer in one module and looks their computation up by
name (``ExpertsInterface``). This registers the name ``moesaic``::

    from moesaic.exchange.experts_backend import register_experts_backend

    register_experts_backend()
    model.set_experts_implementation("moesaic")  # or from_pretrained(experts_implementation=...)

Letters: T tokens, K experts of a token, E experts, D model dim, F hidden width of an expert.
"""

import importlib
from typing import Any

import torch
from torch import nn

from moesaic.core.errors import ConfigError, UserError
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.moe.dispatcher import sort_edges
from moesaic.moe.experts import FunctionalExperts
from moesaic.moe.routing import Routing
from moesaic.nn.feed_forward import GELU, Activation, ReLU, SquaredReLU, SwiGLU
from moesaic.ops.grouped_gemm import FeedForwardWeights
from moesaic.ops.kernel_selection import REAL_TENSOR_TYPES

BACKEND_NAME = "moesaic"
_INTERFACE = "transformers.integrations.moe"
_GATED: dict[str, Activation] = {"SiLU": SwiGLU(), "SiLUActivation": SwiGLU()}  # by class
_PLAIN: dict[str, Activation] = {
    "ReLU": ReLU(),
    "ReLUSquaredActivation": SquaredReLU(),
    "GELUActivation": GELU(),
}


def register_experts_backend() -> str:
    """Register our kernels in transformers. Returns the name to select them by.

    Raises UserError without transformers 5.20 (``pip install "moesaic[hf]"``).
    """
    try:
        moe = importlib.import_module(_INTERFACE)
        moe.ExpertsInterface.register(BACKEND_NAME, experts_forward)
    except (ImportError, AttributeError) as error:
        raise UserError(
            'the backend needs transformers 5.20 or newer: pip install "moesaic[hf]"'
        ) from error
    return BACKEND_NAME


def experts_forward(
    experts: Any,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Return each token's weighted sum of expert outputs, as their modules call a backend.

    An index of ``num_experts`` or more is computed by another rank and counts as dropped.

    Raises ConfigError for experts that our kernels do not compute: biases, other activations.
    """
    activation = _activation(experts)
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    weights = FeedForwardWeights(
        _inputs_first(first, transposed=experts.is_transposed),
        _inputs_first(experts.down_proj, transposed=experts.is_transposed),
        None,
        None,
    )
    edges = sort_edges(_routing(top_k_index, top_k_weights, num_experts=len(first)))
    return FunctionalExperts(weights, activation).forward_edges(hidden_states, edges=edges)


def _routing(index: Tensor, weight: Tensor, *, num_experts: int) -> Routing:
    weight = weight.float().where(index < num_experts, 0.0)
    return Routing.from_topk(weight, expert=index.clamp(max=num_experts), num_experts=num_experts)


def _activation(experts: Any) -> Activation:
    """Return the activation of their experts. Raises ConfigError: not one of our kernels'."""
    own = type(experts)._apply_gate.__module__
    act = type(dict(experts.named_children()).get("act_fn")).__name__
    known = _GATED if experts.has_gate else _PLAIN
    problems = {
        "biases": experts.has_bias,
        "a norm after each expert": experts.has_post_expert_norm,
        "alternating rows of gate and value": not experts.is_concatenated,
        "a gate of its own": experts.has_gate and own != _INTERFACE,
        f"the activation {act}": act != "NoneType" and act not in known,
    }
    found = [name for name, has in problems.items() if has]
    if found:
        raise ConfigError(
            [
                f"{type(experts).__name__} has {', '.join(found)}, which the backend "
                f'{BACKEND_NAME} does not compute; model.set_experts_implementation("grouped_mm")'
            ]
        )
    return known[act]


def _inputs_first(weight: nn.Parameter, *, transposed: bool) -> Float[Tensor, "E D F"]:
    """Return weights as our kernels read them, without a copy at each call.

    Their parameters [E, F, D] are laid out once as the transpose in memory; shape, values and
    names stay, so that optimizers, checkpoints and the other backends are not concerned.
    """
    if transposed:
        return weight
    turned = weight.transpose(1, 2)
    plain = type(weight) in REAL_TENSOR_TYPES and not torch.compiler.is_compiling()
    if plain and not turned.is_contiguous():
        with torch.no_grad():
            weight.data = turned.contiguous().transpose(1, 2)
        turned = weight.transpose(1, 2)
    return turned
