"""The trial passes where kernels are right, says what is wrong where not, and decides the pick."""

import pytest
import torch

from moesaic.nn.feed_forward import ReLU, SwiGLU
from moesaic.ops import kernel_selection
from moesaic.ops.cpu.cpu_moe_kernel import CPUMoEKernel
from moesaic.ops.moe_kernel import UnfusedMoEKernel
from moesaic.ops.triton import kernel_launch
from moesaic.ops.triton.kernel_check import REFERENCE_ACTIVATIONS, kernel_failure
from moesaic.ops.triton.triton_moe_kernel import TritonMoEKernel


@pytest.fixture
def fresh():
    kernel_selection._triton_selection.cache_clear()
    yield
    kernel_selection._triton_selection.cache_clear()


def test_the_trial_knows_every_activation_of_ours():
    for kind in (ReLU, SwiGLU):
        assert kind.kernel_name in REFERENCE_ACTIVATIONS


def test_the_trial_passes(device):
    assert kernel_failure(device, dtype=torch.float32, activation="swiglu") == ""


def test_the_trial_says_what_is_wrong(device, monkeypatch):
    right = kernel_launch.down_backward

    def wrong(*args, **options):
        through = right(*args, **options)
        return through._replace(weight=through.weight * 1.01)

    monkeypatch.setattr(kernel_launch, "down_backward", wrong)
    assert "weights is off" in kernel_failure(device, dtype=torch.float32, activation="relu")


def test_a_kernel_that_raises_is_a_reason_not_a_crash(device, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such card")

    monkeypatch.setattr(kernel_launch, "up_projection", broken)
    assert "no such card" in kernel_failure(device, dtype=torch.float32, activation="relu")


def test_what_has_no_kernel_is_said(device):
    assert "no kernel" in kernel_failure(device, dtype=torch.float64, activation="relu")
    assert "no kernel" in kernel_failure(device, dtype=torch.float32, activation="mine")


@pytest.mark.parametrize("failure", ["", "made up"])
def test_the_pick_follows_the_trial(failure, fresh, monkeypatch):
    def answer(device, *, dtype, activation):
        return failure

    monkeypatch.setattr("moesaic.ops.triton.kernel_check.kernel_failure", answer)
    found = kernel_selection._triton_selection("cuda", torch.float32, "swiglu")
    assert isinstance(found.kernel, TritonMoEKernel) == (not failure)
    assert ("made up" in found.reason) == bool(failure)
    mixture = kernel_selection._select_moe("cuda", torch.float32)
    assert mixture.implementation == ("composed" if failure else "triton")


def test_a_cpu_takes_no_kernels():
    assert isinstance(
        kernel_selection.select_moe_kernel(torch.zeros(1), activation=SwiGLU()),
        UnfusedMoEKernel | CPUMoEKernel,
    )
