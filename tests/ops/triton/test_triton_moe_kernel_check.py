"""The kernel check passes for right kernels, names what is wrong, and decides the selection."""

import pytest
import torch

from moesaic.nn.feed_forward import ReLU, SwiGLU
from moesaic.ops import kernel_selection
from moesaic.ops.cpu.cpu_moe_kernel import CPUMoEKernel
from moesaic.ops.moe_kernel import UnfusedMoEKernel
from moesaic.ops.triton import kernel_launch
from moesaic.ops.triton.triton_moe_kernel import ACTIVATIONS, TritonMoEKernel, kernel_failure


@pytest.fixture
def fresh():
    kernel_selection._triton_kernel.cache_clear()
    yield
    kernel_selection._triton_kernel.cache_clear()


def test_every_activation_has_a_kernel():
    for kind in (ReLU, SwiGLU):
        assert kind.kernel_name in ACTIVATIONS


def test_the_check_passes(device):
    assert kernel_failure(device, dtype=torch.float32, activation="swiglu") == ""


def test_the_check_names_what_is_wrong(device, monkeypatch):
    right = kernel_launch.down_backward

    def wrong(*args, **options):
        through = right(*args, **options)
        return through._replace(weight=through.weight * 1.01)

    monkeypatch.setattr(kernel_launch, "down_backward", wrong)
    assert "edge weights differs" in kernel_failure(device, dtype=torch.float32, activation="relu")


def test_a_kernel_that_raises_is_a_reason_not_a_crash(device, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such card")

    monkeypatch.setattr(kernel_launch, "up_projection", broken)
    assert "no such card" in kernel_failure(device, dtype=torch.float32, activation="relu")


def test_a_missing_kernel_is_reported(device):
    assert "no kernel" in kernel_failure(device, dtype=torch.float64, activation="relu")
    assert "no kernel" in kernel_failure(device, dtype=torch.float32, activation="mine")


@pytest.mark.parametrize("failure", ["", "made up"])
def test_the_selection_follows_the_check(failure, fresh, monkeypatch):
    def output(device, *, dtype, activation):
        return failure

    monkeypatch.setattr("moesaic.ops.triton.triton_moe_kernel.kernel_failure", output)
    kernel, reason = kernel_selection._triton_kernel("cuda", torch.float32, "swiglu")
    assert isinstance(kernel, TritonMoEKernel) == (not failure)
    assert ("made up" in reason) == bool(failure)


def test_a_cpu_takes_no_kernels():
    assert isinstance(
        kernel_selection.select_moe_kernel(torch.zeros(1), activation=SwiGLU()),
        UnfusedMoEKernel | CPUMoEKernel,
    )
