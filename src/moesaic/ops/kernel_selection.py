"""Which implementation each operation takes on a device, and why: a probe that runs, in words.

Nothing here is a setting. A pick depends on the device and dtype alone, so two runs on one machine
take the same path.
"""

import importlib
from dataclasses import dataclass
from functools import cache

import torch

from moesaic.core.shapes import Tensor
from moesaic.ops.cpu.cpu_library import load_library
from moesaic.ops.cpu.cpu_moe_kernel import ACTIVATION_CODES, DTYPE_CODES, CPUMoEKernel
from moesaic.ops.grouped_gemm import (
    ActivationFunction,
    GroupedGEMM,
    GroupedMM,
    PaddedBMM,
    SequentialGEMM,
)
from moesaic.ops.moe_kernel import MoEKernel, UnfusedMoEKernel
from moesaic.ops.permute import group_by_expert

_REAL_TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
GROUPED_GEMMS: dict[str, GroupedGEMM] = {
    e.name: e for e in (SequentialGEMM(), GroupedMM(), PaddedBMM())
}


@dataclass(frozen=True, slots=True)
class SelectedKernel:
    """An operation, the implementation it takes here, and why in words."""

    operation: str
    implementation: str
    reason: str


def select_grouped_gemm(rows: Tensor) -> GroupedGEMM:
    """Return the engine for expert rows on this device and of this dtype."""
    return GROUPED_GEMMS[_select_gemm(rows.device.type, rows.dtype).implementation]


def select_moe_kernel(x: Tensor, *, activation: ActivationFunction) -> MoEKernel:
    """Return the way to compute an MoE layer's mixture on this device, of this dtype."""
    composed = UnfusedMoEKernel(select_grouped_gemm(x))
    if type(x) not in _REAL_TENSOR_TYPES:
        return composed  # a fake tensor has no memory that a kernel could read
    if x.device.type == "cpu":
        library = (
            load_library().library
            if x.dtype in DTYPE_CODES and activation.kernel_name in ACTIVATION_CODES
            else None
        )
        return composed if library is None else CPUMoEKernel(library, composed)
    if activation.kernel_name and x.device.type != "meta":
        return _triton_selection(x.device.type, x.dtype, activation.kernel_name).kernel or composed
    return composed  # fused kernels know a few activations by name; the composed path takes any


def selected_kernels(
    device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32
) -> list[SelectedKernel]:
    """Every choice made for a device, for ``moesaic doctor``."""
    kind = torch.device(device).type
    return [_select_moe(kind, dtype), _select_gemm(kind, dtype), _select_attention(kind)]


def _select_moe(device: str, dtype: torch.dtype) -> SelectedKernel:
    if device == "cpu" and dtype in DTYPE_CODES:
        native = load_library()
        return SelectedKernel(
            "mixture", "composed" if native.library is None else "fused", native.reason
        )
    if device in ("cpu", "meta"):
        return SelectedKernel(
            "mixture", "composed", f"there is no fused kernel for {dtype} on {device}"
        )
    found = _triton_selection(device, dtype, "swiglu")  # one activation stands for the others
    return SelectedKernel(
        "mixture", "composed" if found.kernel is None else found.kernel.name, found.reason
    )


@dataclass(frozen=True, slots=True)
class _TritonSelection:
    """A fused mixer, or None, and why."""

    kernel: MoEKernel | None
    reason: str


@cache
def _triton_selection(device: str, dtype: torch.dtype, activation: str) -> _TritonSelection:
    """Bring in the Triton kernels and try them. By name: nothing else may need Triton."""
    try:
        check = importlib.import_module("moesaic.ops.triton.kernel_check")
    except ImportError as error:
        return _TritonSelection(None, f"Triton cannot be imported: {error}")
    failure = check.kernel_failure(torch.device(device), dtype=dtype, activation=activation)
    if failure:
        return _TritonSelection(None, f"the Triton kernels failed a trial on {device}: {failure}")
    return _TritonSelection(
        check.TritonMoEKernel(), f"the Triton kernels passed a trial on {device}"
    )


@cache
def _select_gemm(device: str, dtype: torch.dtype) -> SelectedKernel:
    if device in ("cpu", "meta"):
        reason = "one mm per expert into the result: measured as fast as grouped_mm or faster here"
        return SelectedKernel("experts", SequentialGEMM.name, reason)
    failure = _grouped_mm_failure(device, dtype)
    if failure:
        return SelectedKernel(
            "experts", SequentialGEMM.name, f"grouped_mm did not run on {device}: {failure}"
        )
    return SelectedKernel(
        "experts", GroupedMM.name, f"grouped_mm ran forward and backward on {device}"
    )


def _grouped_mm_failure(device: str, dtype: torch.dtype) -> str:
    """Run a tiny product both ways; return what went wrong, or nothing."""
    try:
        groups = group_by_expert(torch.tensor([0, 2, 2, 1], device=device), num_experts=4)
        rows = torch.ones(4, 16, device=device, dtype=dtype)
        bank = torch.ones(4, 16, 16, device=device, dtype=dtype)
        out = GroupedMM().matmul(rows, bank.transpose(1, 2), groups=groups)
        grad = GroupedMM().weight_gradient(rows, out, groups=groups)
    except (RuntimeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:120]
    fine = bool((out == 16).all()) and float(grad[2, 0, 0]) == 32 and float(grad[3].sum()) == 0
    return "" if fine else "wrong values"


def _select_attention(device: str) -> SelectedKernel:
    reason = "scaled_dot_product_attention; the mask is left out where a batch has no padding"
    return SelectedKernel("attention", "flash" if device == "cpu" else "torch's choice", reason)
