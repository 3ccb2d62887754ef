"""A library is believed when it gives its twin's numbers, and otherwise not used."""

import subprocess
import sys

import pytest
import torch

from moesaic.cli.doctor_command import doctor
from moesaic.nn.feed_forward import ReLU, SwiGLU
from moesaic.ops import kernel_selection
from moesaic.ops.cpu.cpu_library import (
    LibraryStatus,
    check_library,
    compare_with_reference,
    load_library,
)
from moesaic.ops.cpu.cpu_moe_kernel import CPUMoEKernel
from moesaic.ops.grouped_gemm import SequentialGEMM
from moesaic.ops.kernel_selection import select_moe_kernel, selected_kernels
from moesaic.ops.moe_kernel import UnfusedMoEKernel

TWIN = UnfusedMoEKernel(SequentialGEMM())


class Wrong:
    """Multiplies one thing by two."""

    name = "wrong"

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, x, *, edges, weights, activation):
        out = TWIN(x, edges=edges, weights=weights, activation=activation)
        if self.what == "output":
            return 2 * out
        return out.detach() + (out - out.detach()) * 2  # right values, wrong gradients

    def kept(self, **sizes):
        return TWIN.saved_activations(**sizes)


def test_the_twin_agrees_with_itself():
    assert compare_with_reference(TWIN, reference=TWIN) == ""


@pytest.mark.parametrize(("what", "named"), [("output", "output"), ("gradient", "gradient of x")])
def test_a_wrong_number_is_found_and_named(what, named):
    assert named in compare_with_reference(Wrong(what), reference=TWIN)


def test_what_is_no_library_is_not_used(tmp_path):
    path = tmp_path / "mixture.so"
    path.write_bytes(b"not an object file")
    found = check_library(path)
    assert found.library is None
    assert "cannot be loaded" in found.reason


def test_without_a_library_the_composed_path_is_taken_and_the_doctor_says_why(monkeypatch, capsys):
    monkeypatch.setattr(
        kernel_selection,
        "load_library",
        lambda: LibraryStatus(None, "no C compiler (cc) on the PATH"),
    )
    assert isinstance(select_moe_kernel(torch.zeros(1), activation=SwiGLU()), UnfusedMoEKernel)
    pick = selected_kernels("cpu")[0]
    assert (pick.operation, pick.implementation) == ("mixture", "composed")
    doctor(as_json=True)
    assert "no C compiler (cc) on the PATH" in capsys.readouterr().out


@pytest.mark.skipif(load_library().library is None, reason=load_library().reason)
def test_with_a_library_the_fused_path_is_taken_where_it_can():
    assert isinstance(select_moe_kernel(torch.zeros(1), activation=ReLU()), CPUMoEKernel)
    assert isinstance(
        select_moe_kernel(torch.zeros(1).bfloat16(), activation=SwiGLU()), CPUMoEKernel
    )
    assert isinstance(
        select_moe_kernel(torch.zeros(1).double(), activation=SwiGLU()), UnfusedMoEKernel
    )
    assert selected_kernels("cpu")[0].implementation == "fused"


def test_the_trial_may_come_first_in_an_inference_under_autocast():
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
