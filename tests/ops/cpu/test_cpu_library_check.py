"""A library is used if it gives the results of the unfused kernel."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moesaic.cli.doctor_command import doctor
from moesaic.nn.feed_forward import ReLU, SwiGLU
from moesaic.ops import kernel_selection
from moesaic.ops.cpu.cpu_library import (
    LibraryStatus,
    check_library,
    load_library,
)
from moesaic.ops.cpu.cpu_moe_kernel import CPUMoEKernel
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.kernel_check import compare_with_unfused
from moesaic.ops.kernel_selection import select_moe_kernel, selected_kernels
from moesaic.ops.moe_kernel import UnfusedMoEKernel

SETTINGS = {"device": torch.device("cpu"), "dtype": torch.float32, "activation": "swiglu"}
UNFUSED = UnfusedMoEKernel(SequentialGEMM())


class Wrong:
    """A kernel with one result multiplied by two."""

    name = "wrong"

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, x, *, edges, weights, activation):
        out = UNFUSED(x, edges=edges, weights=weights, activation=activation)
        if self.what == "output":
            return 2 * out
        return out.detach() + (out - out.detach()) * 2  # right values, wrong gradients


def test_the_unfused_kernel_agrees_with_itself():
    assert compare_with_unfused(UNFUSED, tolerance=1e-6, **SETTINGS) == ""


@pytest.mark.parametrize(("what", "named"), [("output", "output"), ("gradient", "gradient of x")])
def test_a_wrong_number_is_found_and_named(what, named):
    assert named in compare_with_unfused(Wrong(what), tolerance=1e-4, **SETTINGS)


def test_what_is_no_library_is_not_used(tmp_path):
    path = tmp_path / "moe.so"
    path.write_bytes(b"not an object file")
    found = check_library(path)
    assert found.library is None
    assert "cannot be loaded" in found.reason


def test_without_a_library_the_unfused_kernel_is_selected_and_doctor_shows_why(monkeypatch):
    monkeypatch.setattr(
        kernel_selection,
        "load_library",
        lambda: LibraryStatus(None, "no C compiler (cc) on the PATH"),
    )
    assert isinstance(select_moe_kernel(torch.zeros(1), activation=SwiGLU()), UnfusedMoEKernel)
    pick = selected_kernels("cpu")[0]
    assert (pick.operation, pick.implementation) == ("MoE layer", "unfused")
    assert "no C compiler (cc) on the PATH" in [row["reason"] for row in doctor().value["kernels"]]


@pytest.mark.skipif(load_library().library is None, reason=load_library().reason)
def test_with_a_library_the_fused_kernel_is_selected_where_it_supports_the_input():
    assert isinstance(select_moe_kernel(torch.zeros(1), activation=ReLU()), CPUMoEKernel)
    assert isinstance(
        select_moe_kernel(torch.zeros(1).bfloat16(), activation=SwiGLU()), CPUMoEKernel
    )
    assert isinstance(
        select_moe_kernel(torch.zeros(1).double(), activation=SwiGLU()), UnfusedMoEKernel
    )
    assert selected_kernels("cpu")[0].implementation == "fused"


def test_the_check_may_run_first_in_a_checkpointed_layer():
    def layer(x):
        assert compare_with_unfused(UNFUSED, tolerance=1e-6, **SETTINGS) == ""
        return x.square()

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_the_check_may_run_first_in_inference_mode_under_autocast():
    done = subprocess.run(
        [sys.executable, "-c", FIRST_IN_INFERENCE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


FIRST_IN_INFERENCE = """
import torch
from moesaic.ops.cpu.cpu_library import load_library

torch.set_default_dtype(torch.bfloat16)
with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
    found = load_library()
print(found.library is not None or "compiler" in found.reason)
print("did not run" not in found.reason)
"""
