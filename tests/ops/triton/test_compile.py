"""Every kernel compiles for cards that are not here, within their shared memory."""

import pytest
import torch

from moesaic.nn.feed_forward import SwiGLU
from moesaic.ops.triton.tiles import load_table
from moesaic.ops.triton.triton_moe_kernel import TritonMoEKernel
from ops.triton.compiling import launches

SHAPE = (4096, 256, 128, 8, 2)
SHARED = {90: 232_448, 80: 101_376}  # bytes per program; the least of Ampere GPUs
EVERY = {"tile_schedule_kernel", "up_projection_kernel", "row_matmul_kernel",
         "unpermute_sum_kernel",
         "down_backward_kernel", "weight_gradient_kernel", "bias_gradient_kernel"}  # fmt: skip


def compiled(kernel, capability, **options):
    """(launch, its compiled kernel) once for each kernel and set of constants."""
    found = {}
    for launch in launches(kernel, options.pop("activation", SwiGLU()), **options):
        key = (launch.name, str(sorted((k, str(v)) for k, v in launch.options.items())))
        if key not in found:
            found[key] = (launch, launch.compile(capability))
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "card"), [(90, "sm90"), (80, "any")])
def test_every_kernel_compiles_to_a_binary(capability, card):
    tiles = load_table()[card]["half"]["few"]  # larger ones take seconds each
    done = compiled(
        TritonMoEKernel(tiles=tiles), capability, shape=SHAPE, dtype=torch.bfloat16, bias=True
    )
    assert {launch.name for launch, _ in done} == EVERY
    for launch, kernel in done:
        assert len(kernel.asm["cubin"]) > 1000, launch.name
        assert f".target sm_{capability}" in kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED[capability]
