"""Kernel check: compare a fused MoE kernel with the unfused one on a small problem."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from moesaic.core.shapes import Tensor
from moesaic.ops.grouped_gemm import ActivationFunction, FeedForwardWeights, SequentialGEMM
from moesaic.ops.moe_kernel import Edges, MoEKernel, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert

REFERENCE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda x: x.relu().square(),
    "gelu": F.gelu,
    "swiglu": lambda x: F.silu(x[:, :HIDDEN]) * x[:, HIDDEN:],
}
TOKENS, DIM, HIDDEN, EXPERTS, K = 48, 64, 32, 4, 2
EDGES_PER_EXPERT = (50, 10, 0, 20, 16)  # many, few, none, some; the last are dropped
RESULTS = ("output", *(f"gradient of {x}" for x in ("x", "the edge weights", "up", "down")))


def compare_with_unfused(
    kernel: MoEKernel,
    *,
    device: torch.device,
    dtype: torch.dtype,
    activation: str,
    tolerance: float,
) -> str:
    """Return how output and gradients differ from those in float32, or "" if they do not.

    ``tolerance`` is relative to the largest value of each result.
    """
    try:
        # independent of the mode in which the first layer runs, checkpointed ones included
        with (
            saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            got = _output_and_gradients(kernel, device, dtype, activation)
            unfused = UnfusedMoEKernel(SequentialGEMM())
            want = _output_and_gradients(unfused, device, torch.float32, activation)
    except Exception as error:  # a compiler or driver may raise anything; the reason is reported
        return f"did not run: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    for name, a, b in zip(RESULTS, got, want, strict=True):
        error = float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-6))
        if not error < tolerance:
            return f"gives wrong values: {name} differs by {error:.1e} of its largest value"
    return ""


def _output_and_gradients(
    kernel: MoEKernel, device: torch.device, dtype: torch.dtype, activation: str
) -> list[Tensor]:
    """Return the output and every gradient, for inputs that every dtype represents exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return (values * scale).bfloat16().to(device, dtype).requires_grad_()

    width = HIDDEN * 2 if activation == "swiglu" else HIDDEN
    x, weight = draw(TOKENS, DIM), draw(TOKENS * K).detach().float().requires_grad_()
    up, down = draw(EXPERTS, DIM, width, scale=0.2), draw(EXPERTS, HIDDEN, DIM, scale=0.2)
    edge = torch.arange(TOKENS * K, device=device)
    counts = torch.tensor(EDGES_PER_EXPERT, device=device)
    expert = torch.arange(EXPERTS + 1, device=device).repeat_interleave(counts)
    groups = group_by_expert(expert[edge * 37 % len(edge)], num_experts=EXPERTS)
    edges = Edges(edge // K, weight, groups, TOKENS, K)
    weights, function = FeedForwardWeights(up, down), _activation_by_name(activation)
    out = kernel(x, edges=edges, weights=weights, activation=function)
    grads = torch.autograd.grad(out, [x, weight, up, down], draw(TOKENS, DIM).detach())
    return [out.detach(), *grads]


def _activation_by_name(activation: str) -> ActivationFunction:
    class Named:
        kernel_name: ClassVar[str] = activation

        def __call__(self, x: Tensor, /) -> Tensor:
            return REFERENCE_ACTIVATIONS[activation](x)

    return Named()
