"""CPUAdamW: AdamW's update of many tensors as one compiled C call on all threads.

The bits are those of ``adamw_by_operations``, at a few reads and writes per value instead of one
pass over memory for each operation. ZeRO-Offload (arXiv:2101.06840, section 5.1) has such a kernel
for states in host memory.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from moesaic.ops.adamw import AdamWFactors, AdamWSettings, AdamWTensor, adamw_by_operations
from moesaic.ops.cpu.cpu_library import BuildError, build_library
from moesaic.ops.cpu.cpu_moe_kernel import DTYPE_CODES

_POINTER_FIELDS = ("param", "grad", "exp_avg", "exp_avg_sq", "rounded")


class AdamWArguments(ctypes.Structure):
    """``adamw_tensor`` of ``source/adamw.c``; its tensors must outlive the call."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTER_FIELDS),
        *((name, ctypes.c_int64) for name in ("size", "grad_dtype")),
        *((name, ctypes.c_float) for name in AdamWFactors._fields),
    )


class CPUAdamW:
    """The compiled kernel at a path; tensors that it does not support go to the reference.

    It supports contiguous tensors on the CPU, float32 and bfloat16 gradients, and bfloat16 outputs.
    Calls release the GIL.
    """

    def __init__(self, path: Path) -> None:
        self._update = ctypes.CDLL(str(path)).moesaic_adamw
        self._update.argtypes = [ctypes.POINTER(AdamWArguments), ctypes.c_int64, ctypes.c_int64]
        self._update.restype = ctypes.c_int

    def __call__(self, tensors: Sequence[AdamWTensor]) -> None:
        """Update tensors in place. Raises MemoryError, with nothing changed."""
        supported = [t for t in tensors if _supports(t)]
        packed = (AdamWArguments * len(supported))(*map(_pack, supported))
        if self._update(packed, len(supported), torch.get_num_threads()):
            raise MemoryError("out of memory for the list of tensors to update")
        if len(supported) < len(tensors):
            adamw_by_operations([t for t in tensors if not _supports(t)])


def _supports(t: AdamWTensor) -> bool:
    given = (t.param, t.exp_avg, t.exp_avg_sq)
    others = (t.grad,) if t.rounded is None else (t.grad, t.rounded)
    return (
        all(x.is_cpu and x.is_contiguous() for x in (*given, *others))
        and all(x.dtype == torch.float32 for x in given)
        and t.grad.dtype in DTYPE_CODES
        and (t.rounded is None or t.rounded.dtype == torch.bfloat16)
    )


def _pack(t: AdamWTensor) -> AdamWArguments:
    rounded = None if t.rounded is None else t.rounded.data_ptr()
    addresses = (x.data_ptr() for x in (t.param, t.grad, t.exp_avg, t.exp_avg_sq))
    code = DTYPE_CODES[t.grad.dtype]
    return AdamWArguments(*addresses, rounded, t.param.numel(), code, *t.factors)


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
