"""Whether this machine has the compiled mixture: it is built, run, and compared with its twin."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F

from moesaic.core.shapes import Tensor
from moesaic.ops.cpu.build import BuildError, build_library
from moesaic.ops.cpu.mixer import CPUMoEKernel
from moesaic.ops.cpu.native import CPULibraryProtocol, CPULibrary
from moesaic.ops.group import group_by_expert
from moesaic.ops.grouped import FeedForwardWeights, SequentialGEMM
from moesaic.ops.mixture import UnfusedMoEKernel, Edges, MoEKernel


@dataclass(frozen=True, slots=True)
class LibraryStatus:
    """The library if it may be used, and why or why not."""

    library: CPULibraryProtocol | None
    reason: str


@cache
def load_library() -> LibraryStatus:
    """Build or load the library, once per process; believe it if it gives the twin's numbers."""
    try:
        path = build_library()
    except BuildError as error:
        return LibraryStatus(None, str(error))
    return check_library(path)


def check_library(path: Path) -> LibraryStatus:
    """Run the library at ``path`` forward and backward on a small mixture."""
    try:
        native = CPULibrary(path)
    except (OSError, AttributeError) as error:
        return LibraryStatus(None, f"{path.name} cannot be loaded: {error}")
    try:
        wrong = compare_with_reference(CPUMoEKernel(native, UnfusedMoEKernel(SequentialGEMM())), reference=UnfusedMoEKernel(SequentialGEMM()))
    except (RuntimeError, MemoryError) as error:
        wrong = f"did not run: {' '.join(str(error).split())[:120]}"
    if wrong:
        return LibraryStatus(None, f"the compiled mixture {wrong}")
    return LibraryStatus(native, "compiled for this CPU; agrees with the composed path, gradients included")


# the first forward pass may be an inference's, under autocast: the trial is neither
@torch.inference_mode(mode=False)
@torch.enable_grad()
@torch.autocast("cpu", enabled=False)
def compare_with_reference(kernel: MoEKernel, *, reference: MoEKernel) -> str:
    """Say how a mixer differs from its twin on a small mixture; nothing if it does not."""
    names = ("output", "gradient of x", "gradient of the weights", "gradient of up and down")
    for name, got, want in zip(names, _output_and_gradients(kernel), _output_and_gradients(reference), strict=True):
        if not torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max())):
            return f"gives another {name} than the composed path"
    return ""


class _SwiGLU:
    kernel_name: ClassVar[str] = "swiglu"

    def __call__(self, x: Tensor, /) -> Tensor:
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


def _output_and_gradients(kernel: MoEKernel) -> list[Tensor]:
    """Output and gradients for 40 tokens, 3 of 5 experts each, one of them with most tokens."""
    draw = torch.Generator().manual_seed(0)
    tokens, dim, hidden, experts, k = 40, 24, 20, 5, 3

    def leaf(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
        return made.requires_grad_()

    x, up, down = leaf(tokens, dim), leaf(experts, dim, 2 * hidden), leaf(experts, hidden, dim)
    weight = leaf(tokens * k)
    expert = torch.randint(0, experts, (tokens * k,), generator=draw, device="cpu")
    expert = expert.clamp(min=2) - 1
    token = torch.arange(tokens, device="cpu").repeat_interleave(k)
    edges = Edges(token, weight, group_by_expert(expert, num_experts=experts), tokens, k)
    out = kernel(x, edges=edges, weights=FeedForwardWeights(up, down), activation=_SwiGLU())
    for_x, for_weight, *rest = torch.autograd.grad(out.square().sum(), (x, weight, up, down))
    both = torch.cat([grad.flatten() for grad in rest])
    return [out.detach(), for_x, for_weight, both]
