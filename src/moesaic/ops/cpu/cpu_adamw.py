"""CPUAdamW: AdamW's update of many tensors as one compiled C call on all threads.

The bits are those of ``adamw_by_operations``, at a few reads and writes per value instead of one
pass over memory for each operation. ZeRO-Offload (arXiv:2101.06840, section 5.1) has such a kernel
for states in host memory.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from moesaic.core.shapes import Tensor
from moesaic.ops.adamw import AdamWFactors, AdamWSettings, AdamWTensor, adamw_by_operations
from moesaic.ops.cpu.cpu_library import BuildError, build_library
from moesaic.ops.cpu.cpu_moe_kernel import DTYPE_CODES

# ``adamw_tensor`` of ``source/adamw.c``: five addresses, size, type of the gradient, the factors
_ARGUMENTS = struct.Struct(f"5P2q{len(AdamWFactors._fields)}f")


class CPUAdamW:
    """The compiled kernel at a path; tensors that it does not support go to the reference.

    It supports contiguous tensors on the CPU, float32 and bfloat16 gradients, and bfloat16 outputs.
    Calls release the GIL.
    """

    def __init__(self, path: Path) -> None:
        self._update = ctypes.CDLL(str(path)).moesaic_adamw
        self._update.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
        self._update.restype = ctypes.c_int

    def __call__(self, tensors: Sequence[AdamWTensor]) -> None:
        """Update tensors in place. Raises MemoryError, with nothing changed."""
        supported = [t for t in tensors if _supports(t)]
        packed = b"".join(map(_pack, supported))
        if self._update(packed, len(supported), torch.get_num_threads()):
            raise MemoryError("out of memory for the list of tensors to update")
        if len(supported) < len(tensors):
            adamw_by_operations([t for t in tensors if not _supports(t)])


def _supports(t: AdamWTensor) -> bool:
    return (
        t.grad.dtype in DTYPE_CODES
        and _is_flat(t.param, torch.float32)
        and _is_flat(t.exp_avg, torch.float32)
        and _is_flat(t.exp_avg_sq, torch.float32)
        and _is_flat(t.grad, t.grad.dtype)
        and (t.rounded is None or _is_flat(t.rounded, torch.bfloat16))
    )


def _is_flat(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()


def _pack(t: AdamWTensor) -> bytes:
    return _ARGUMENTS.pack(
        t.param.data_ptr(),
        t.grad.data_ptr(),
        t.exp_avg.data_ptr(),
        t.exp_avg_sq.data_ptr(),
        0 if t.rounded is None else t.rounded.data_ptr(),
        t.param.numel(),
        DTYPE_CODES[t.grad.dtype],
        *t.factors,
    )


@dataclass(frozen=True, slots=True)
class AdamWStatus:
    """The kernel if it is usable, and the reason."""

    kernel: CPUAdamW | None
    reason: str


@cache
def load_adamw() -> AdamWStatus:
    """Build or load the kernel once per process; it is used if it passes ``check_adamw``."""
    try:
        path = build_library("adamw")
    except BuildError as error:
        return AdamWStatus(None, str(error))
    return check_adamw(path)


def check_adamw(path: Path) -> AdamWStatus:
    """Compare the kernel at ``path`` with the reference, bit for bit."""
    try:
        kernel = CPUAdamW(path)
    except (OSError, AttributeError) as error:
        return AdamWStatus(None, f"{path.name} cannot be loaded: {error}")
    with torch.inference_mode(mode=False), torch.no_grad():
        compiled, reference = _small_problem(), _small_problem()
        kernel([compiled])
        adamw_by_operations([reference])
        for name in ("param", "exp_avg", "exp_avg_sq", "rounded"):
            if not torch.equal(getattr(compiled, name), getattr(reference, name)):
                return AdamWStatus(None, f"the compiled kernel has another {name} than torch")
    return AdamWStatus(kernel, "compiled for this CPU; the bits are those of torch's operations")


def _small_problem() -> AdamWTensor:
    # no torch generator: a check must not advance the random numbers of a run
    wave = torch.arange(133, dtype=torch.float32, device="cpu")
    values = [(wave * factor).sin() for factor in (1.7, 2.9, 0.3)]
    settings = AdamWSettings(lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    return AdamWTensor(
        *values,
        exp_avg_sq=(wave * 0.7).cos().square(),
        factors=settings.factors(3, grad_scale=0.7),
        rounded=torch.zeros(133, dtype=torch.bfloat16, device="cpu"),
    )
