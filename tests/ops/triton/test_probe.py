"""The trial passes where kernels are right, says what is wrong where not, and decides the pick."""

import pytest
import torch

from moesaic.nn.activation import ReLU, SwiGLU
from moesaic.ops import choose
from moesaic.ops.cpu.mixer import CPUMoEKernel
from moesaic.ops.mixture import UnfusedMoEKernel
from moesaic.ops.triton import launch
from moesaic.ops.triton.mixer import TritonMoEKernel
from moesaic.ops.triton.probe import REFERENCE_ACTIVATIONS, kernel_failure


@pytest.fixture
def fresh():
    choose._triton_selection.cache_clear()
    yield
    choose._triton_selection.cache_clear()


def test_the_trial_knows_every_activation_of_ours():
    for kind in (ReLU, SwiGLU):
        assert kind.kernel_name in REFERENCE_ACTIVATIONS


def test_the_trial_passes(device):
    assert kernel_failure(device, dtype=torch.float32, activation="swiglu") == ""


def test_the_trial_says_what_is_wrong(device, monkeypatch):
    right = launch.down_backward

    def wrong(*args, **options):
        through = right(*args, **options)
        return through._replace(weight=through.weight * 1.01)

    monkeypatch.setattr(launch, "down_back", wrong)
    assert "weights is off" in kernel_failure(device, dtype=torch.float32, activation="relu")


def test_a_kernel_that_raises_is_a_reason_not_a_crash(device, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such card")

    monkeypatch.setattr(launch, "up", broken)
    assert "no such card" in kernel_failure(device, dtype=torch.float32, activation="relu")


def test_what_has_no_kernel_is_said(device):
    assert "no kernel" in kernel_failure(device, dtype=torch.float64, activation="relu")
    assert "no kernel" in kernel_failure(device, dtype=torch.float32, activation="mine")


@pytest.mark.parametrize("failure", ["", "made up"])
def test_the_pick_follows_the_trial(failure, fresh, monkeypatch):
    def answer(device, *, dtype, activation):
        return failure

    monkeypatch.setattr("moesaic.ops.triton.probe.probe", answer)
    found = choose._triton_selection("cuda", torch.float32, "swiglu")
    assert isinstance(found.kernel, TritonMoEKernel) == (not failure)
    assert ("made up" in found.reason) == bool(failure)
    mixture = choose._select_moe("cuda", torch.float32)
    assert mixture.implementation == ("composed" if failure else "triton")


def test_a_cpu_takes_no_kernels():
    assert isinstance(choose.select_moe_kernel(torch.zeros(1), activation=SwiGLU()), UnfusedMoEKernel | CPUMoEKernel)
