"""Compile the launches of a kernel for a GPU that is not present: launches are recorded."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.ops.grouped_gemm import FeedForwardWeights
from moesaic.ops.moe_kernel import Edges
from moesaic.ops.permute import group_by_expert

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    args: tuple
    options: dict

    @property
    def name(self):
        return self.kernel.fn.__name__

    def compile(self, capability):
        names = self.kernel.arg_names
        values = dict(zip(names, self.args, strict=False)) | {
            k: v for k, v in self.options.items() if k in names
        }
        fixed = {n: values[n] for n in names if self.kernel.params[names.index(n)].is_constexpr}
        signature = {n: "constexpr" if n in fixed else _type(values[n]) for n in names}
        whole = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n not in fixed and _whole(values[n])
        }
        source = ASTSource(self.kernel, signature, constexprs=fixed, attrs=whole)
        options = {k: v for k, v in self.options.items() if k in ("num_warps", "num_stages")}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _type(value):
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32"


def _whole(value):
    if isinstance(value, int):
        return value % 16 == 0
    return isinstance(value, torch.Tensor)


@contextmanager
def recorded():
    """Yield the list of launches made inside; nothing runs."""
    found = []

    def record(self, *args, grid, warmup, **options):
        found.append(Launch(self, args, options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        yield found


def launches(kernel, activation, *, shape, dtype, bias=False, per_token=True):
    """Every launch of a forward and a backward pass at a shape (T, D, F, E, K), without memory."""
    tokens, dim, hidden, experts, k = shape
    width = activation.width(hidden)

    def leaf(*size):
        return torch.empty(size, device="meta", dtype=dtype, requires_grad=True)

    expert = torch.empty(tokens * k, device="meta", dtype=torch.long)
    token, weight = torch.empty_like(expert), torch.empty(tokens * k, device="meta")
    groups = group_by_expert(expert, num_experts=experts)
    edges = Edges(token, weight, groups, tokens, k if per_token else 0)
    biases = (leaf(experts, width), leaf(experts, dim)) if bias else (None, None)
    weights = FeedForwardWeights(leaf(experts, dim, width), leaf(experts, hidden, dim), *biases)
    with recorded() as found:
        out = kernel(leaf(tokens, dim), edges=edges, weights=weights, activation=activation)
        out.backward(torch.empty_like(out))
    return found
