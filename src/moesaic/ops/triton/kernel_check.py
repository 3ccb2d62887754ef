"""Does the fused mixer do here what its plain twin does? A tiny problem, both ways."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Tensor
from moesaic.ops.grouped_gemm import ActivationFunction, FeedForwardWeights, SequentialGEMM
from moesaic.ops.moe_kernel import Edges, MoEKernel, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert
from moesaic.ops.triton.triton_moe_kernel import DTYPES, TritonMoEKernel

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
REFERENCE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda x: x.relu().square(),
    "gelu": F.gelu,
    "swiglu": lambda x: F.silu(x[:, :HIDDEN]) * x[:, HIDDEN:],
}
TOKENS, DIM, HIDDEN, EXPERTS, K = 48, 64, 32, 4, 2


def _activation_by_name(activation: str) -> ActivationFunction:
    """Return an activation by the name that kernels know."""

    class Named:
        kernel_name: ClassVar[str] = activation

        def __call__(self, x: Tensor, /) -> Tensor:
            return REFERENCE_ACTIVATIONS[activation](x)

    return Named()


def kernel_failure(device: torch.device, *, dtype: torch.dtype, activation: str) -> str:
    """Return what went wrong, or nothing. Compiles the kernels and waits for the device."""
    if dtype not in DTYPES or activation not in REFERENCE_ACTIVATIONS:
        return f"there is no kernel for {dtype} and {activation!r}"
    try:
        # whatever the layer that asks first runs under
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            got = _output_and_gradients(
                TritonMoEKernel(), device=device, dtype=dtype, activation=activation
            )
            twin = UnfusedMoEKernel(SequentialGEMM())
            want = _output_and_gradients(
                twin, device=device, dtype=torch.float32, activation=activation
            )
    except Exception as error:  # a compiler and a driver may raise anything; the reason is kept
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    for name, a, b in zip(("output", "x", "weights", "up", "down"), got, want, strict=True):
        error = float((a.float() - b).abs().max() / b.abs().max().clamp(min=1e-6))
        if not error < TOLERANCE[dtype]:
            return f"wrong values: {name} is off by {error:.1e} of its largest"
    return ""


def _output_and_gradients(
    kernel: MoEKernel, *, device: torch.device, dtype: torch.dtype, activation: str
) -> list[Tensor]:
    """Return the output and every gradient; the inputs are those that ``dtype`` can hold."""
    draw = torch.Generator().manual_seed(0)
    width = HIDDEN * 2 if activation == "swiglu" else HIDDEN

    def leaf(*shape: int, scale: float) -> Tensor:
        exact = (torch.randn(shape, generator=draw) * scale).bfloat16()
        return exact.to(device, dtype).requires_grad_()

    x, weight = leaf(TOKENS, DIM, scale=1.0), torch.rand(TOKENS * K, generator=draw).to(device)
    up, down = leaf(EXPERTS, DIM, width, scale=0.2), leaf(EXPERTS, HIDDEN, DIM, scale=0.2)
    back = torch.randn(TOKENS, DIM, generator=draw).bfloat16().to(device, dtype)
    expert = (torch.arange(TOKENS * K) ** 2 % (EXPERTS + 1)).to(device)  # some lead nowhere
    token = torch.arange(TOKENS).repeat_interleave(K).to(device)
    groups = group_by_expert(expert, num_experts=EXPERTS)
    edges = Edges(token, weight.requires_grad_(), groups, TOKENS, K)
    out = kernel(
        x,
        edges=edges,
        weights=FeedForwardWeights(up, down),
        activation=_activation_by_name(activation),
    )
    return [out.detach(), *torch.autograd.grad(out, [x, weight, up, down], back)]
