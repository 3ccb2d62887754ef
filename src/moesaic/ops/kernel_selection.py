"""Kernel selection: which implementation each operation uses on a device, and why.

A selection depends on the device and dtype only, so two runs on one machine use the same kernels.
An implementation that may fail on a device is tried on a small problem first.
"""

import importlib
from dataclasses import dataclass
from functools import cache

import torch

from moesaic.core.shapes import Tensor
from moesaic.ops.adamw import AdamWKernel, adamw_by_operations
from moesaic.ops.cpu.cpu_adamw import load_adamw
from moesaic.ops.cpu.cpu_library import load_library
from moesaic.ops.cpu.cpu_moe_kernel import (
    ACTIVATION_CODES,
    DTYPE_CODES,
    CPUMoEKernel,
    ShapesOnlyLibrary,
)
from moesaic.ops.grouped_gemm import (
    ActivationFunction,
    GroupedGEMM,
    GroupedMM,
    SequentialGEMM,
    ShapesOnlyGEMM,
)
from moesaic.ops.moe_kernel import MoEKernel, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert

# other types (fake tensors, DTensors) have no memory that a compiled kernel could read
REAL_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
GROUPED_GEMMS: dict[str, GroupedGEMM] = {e.name: e for e in (SequentialGEMM(), GroupedMM())}


@dataclass(frozen=True, slots=True)
class SelectedKernel:
    """An operation, the implementation selected for it, and the reason in words."""

    operation: str
    implementation: str
    reason: str


def select_grouped_gemm(rows: Tensor) -> GroupedGEMM:
    """Return the grouped GEMM for the device and dtype of ``rows``."""
    if _is_simulated(rows):
        return ShapesOnlyGEMM()
    return GROUPED_GEMMS[_select_gemm(rows.device.type, rows.dtype).implementation]


def select_moe_kernel(x: Tensor, *, activation: ActivationFunction) -> MoEKernel:
    """Return the MoE kernel for the device and dtype of ``x``."""
    unfused = UnfusedMoEKernel(select_grouped_gemm(x))
    if _is_simulated(x):  # the memory of the fused kernels on any machine: it compiles nothing
        return CPUMoEKernel(ShapesOnlyLibrary(), unfused)
    if type(x) not in REAL_TENSOR_TYPES:
        return unfused
    name = activation.kernel_name
    return _fused_kernel(x.device.type, x.dtype, name, fallback=unfused)[0] or unfused


def _is_simulated(x: Tensor) -> bool:
    """Whether a tensor has no memory that a kernel could read, and is not one of a compiler."""
    return type(x) not in REAL_TENSOR_TYPES and not torch.compiler.is_compiling()


def select_adamw() -> AdamWKernel:
    """Return AdamW's update of tensors in host memory; every one gives the same bits."""
    return load_adamw().kernel or adamw_by_operations


def selected_kernels(
    device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32
) -> list[SelectedKernel]:
    """Return every selection for a device, for ``moesaic doctor``."""
    kind = torch.device(device).type
    unfused = UnfusedMoEKernel(SequentialGEMM())
    kernel, reason = _fused_kernel(kind, dtype, "swiglu", fallback=unfused)  # for any activation
    attention = "scaled_dot_product_attention; without a mask where a batch has no padding"
    adamw = SelectedKernel("AdamW", "torch", "torch's fused kernel")
    if kind == "cpu":
        status = load_adamw()
        name = "separate operations" if status.kernel is None else "compiled"
        adamw = SelectedKernel("AdamW", name, status.reason)
    return [
        SelectedKernel("MoE layer", "unfused" if kernel is None else kernel.name, reason),
        _select_gemm(kind, dtype),
        SelectedKernel("attention", "flash" if kind == "cpu" else "torch's choice", attention),
        adamw,
    ]


def _fused_kernel(
    device: str, dtype: torch.dtype, activation: str, *, fallback: MoEKernel
) -> tuple[MoEKernel | None, str]:
    """Return the fused kernel, or None, and the reason."""
    if device == "cpu" and dtype in DTYPE_CODES and activation in ACTIVATION_CODES:
        status = load_library()
        kernel = None if status.library is None else CPUMoEKernel(status.library, fallback)
        return kernel, status.reason
    if device in ("cpu", "meta") or not activation:
        return None, f"there is no fused kernel for {dtype} on {device}"
    return _triton_kernel(device, dtype, activation)


@cache
def _triton_kernel(
    device: str, dtype: torch.dtype, activation: str
) -> tuple[MoEKernel | None, str]:
    """Import the Triton kernels by name, as Triton is optional, and check them on the device."""
    try:
        triton = importlib.import_module("moesaic.ops.triton.triton_moe_kernel")
    except ImportError as error:
        return None, f"Triton cannot be imported: {error}"
    failure = triton.kernel_failure(torch.device(device), dtype=dtype, activation=activation)
    if failure:
        return None, f"Triton on {device}: {failure}"
    return triton.TritonMoEKernel(), f"the Triton kernels passed a check on {device}"


@cache
def _select_gemm(device: str, dtype: torch.dtype) -> SelectedKernel:
    if device in ("cpu", "meta"):
        name = SequentialGEMM.name
        reason = "one mm per expert: measured as fast as grouped_mm or faster on a CPU"
    elif failure := _grouped_mm_failure(device, dtype):
        name, reason = SequentialGEMM.name, f"grouped_mm did not run on {device}: {failure}"
    else:
        name, reason = GroupedMM.name, f"grouped_mm ran forward and backward on {device}"
    return SelectedKernel("grouped GEMM", name, reason)


def _grouped_mm_failure(device: str, dtype: torch.dtype) -> str:
    """Run a tiny product forward and backward; return what is wrong, or ""."""
    try:
        groups = group_by_expert(torch.tensor([0, 2, 2, 1], device=device), num_experts=4)
        rows = torch.ones(4, 16, device=device, dtype=dtype)
        weight = torch.ones(4, 16, 16, device=device, dtype=dtype)
        out = GroupedMM().matmul(rows, weight.transpose(1, 2), groups=groups)
        grad = GroupedMM().weight_gradient(rows, out, groups=groups)
    except (RuntimeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:120]
    fine = bool((out == 16).all()) and float(grad[2, 0, 0]) == 32 and float(grad[3].sum()) == 0
    return "" if fine else "wrong values"
