"""Which implementation each operation takes on a device, and why: a probe that runs, in words.

Nothing here is a setting. A pick depends on the device and dtype alone, so two runs on one machine
take the same path.
"""

import importlib
from dataclasses import dataclass
from functools import cache

import torch

from moesaic.core.shapes import Tensor
from moesaic.ops.cpu.mixer import Fused
from moesaic.ops.cpu.native import ACTIVATIONS, KINDS
from moesaic.ops.cpu.probe import find
from moesaic.ops.group import group
from moesaic.ops.grouped import Activation, Engine, GroupedMM, PaddedBMM, Segments
from moesaic.ops.mixture import Composed, Mixer

_PLAIN = (torch.Tensor, torch.nn.Parameter)
ENGINES: dict[str, Engine] = {e.name: e for e in (Segments(), GroupedMM(), PaddedBMM())}


@dataclass(frozen=True, slots=True)
class Pick:
    """An operation, the implementation it takes here, and why in words."""

    op: str
    implementation: str
    reason: str


def pick_engine(rows: Tensor) -> Engine:
    """Return the engine for expert rows on this device and of this dtype."""
    return ENGINES[_engine(rows.device.type, rows.dtype).implementation]


def pick_mixer(x: Tensor, *, activation: Activation) -> Mixer:
    """Return the way to compute an MoE layer's mixture on this device, of this dtype."""
    composed = Composed(pick_engine(x))
    if type(x) not in _PLAIN:
        return composed  # a fake tensor has no memory that a kernel could read
    if x.device.type == "cpu":
        library = find().library if x.dtype in KINDS and activation.kernel in ACTIVATIONS else None
        return composed if library is None else Fused(library, composed)
    if activation.kernel and x.device.type != "meta":
        return _kernels(x.device.type, x.dtype, activation.kernel).mixer or composed
    return composed  # fused kernels know a few activations by name; the composed path takes any


def picks(device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32) -> list[Pick]:
    """Every choice made for a device, for ``moesaic doctor``."""
    kind = torch.device(device).type
    return [_mixture(kind, dtype), _engine(kind, dtype), _attention(kind)]


def _mixture(device: str, dtype: torch.dtype) -> Pick:
    if device == "cpu" and dtype in KINDS:
        native = find()
        return Pick("mixture", "composed" if native.library is None else "fused", native.reason)
    if device in ("cpu", "meta"):
        return Pick("mixture", "composed", f"there is no fused kernel for {dtype} on {device}")
    found = _kernels(device, dtype, "swiglu")  # one activation stands for the others
    return Pick("mixture", "composed" if found.mixer is None else found.mixer.name, found.reason)


@dataclass(frozen=True, slots=True)
class _Kernels:
    """A fused mixer, or None, and why."""

    mixer: Mixer | None
    reason: str


@cache
def _kernels(device: str, dtype: torch.dtype, activation: str) -> _Kernels:
    """Bring in the Triton kernels and try them. By name: nothing else may need Triton."""
    try:
        probe = importlib.import_module("moesaic.ops.triton.probe")
    except ImportError as error:
        return _Kernels(None, f"Triton cannot be imported: {error}")
    failure = probe.probe(torch.device(device), dtype=dtype, activation=activation)
    if failure:
        return _Kernels(None, f"the Triton kernels failed a trial on {device}: {failure}")
    return _Kernels(probe.TritonMixer(), f"the Triton kernels passed a trial on {device}")


@cache
def _engine(device: str, dtype: torch.dtype) -> Pick:
    if device in ("cpu", "meta"):
        reason = "one mm per expert into the result: measured as fast as grouped_mm or faster here"
        return Pick("experts", Segments.name, reason)
    failure = _probe(device, dtype)
    if failure:
        return Pick("experts", Segments.name, f"grouped_mm did not run on {device}: {failure}")
    return Pick("experts", GroupedMM.name, f"grouped_mm ran forward and backward on {device}")


def _probe(device: str, dtype: torch.dtype) -> str:
    """Run a tiny product both ways; return what went wrong, or nothing."""
    try:
        groups = group(torch.tensor([0, 2, 2, 1], device=device), num_experts=4)
        rows = torch.ones(4, 16, device=device, dtype=dtype)
        bank = torch.ones(4, 16, 16, device=device, dtype=dtype)
        out = GroupedMM().apply(rows, bank.transpose(1, 2), groups=groups)
        grad = GroupedMM().outer(rows, out, groups=groups)
    except (RuntimeError, NotImplementedError) as error:
        return " ".join(str(error).split())[:120]
    fine = bool((out == 16).all()) and float(grad[2, 0, 0]) == 32 and float(grad[3].sum()) == 0
    return "" if fine else "wrong values"


def _attention(device: str) -> Pick:
    reason = "scaled_dot_product_attention; the mask is left out where a batch has no padding"
    return Pick("attention", "flash" if device == "cpu" else "torch's choice", reason)
