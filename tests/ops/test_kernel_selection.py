"""Every selection is an existing implementation with a reason."""

import torch

from moesaic.ops.kernel_selection import GROUPED_GEMMS, select_grouped_gemm, selected_kernels


def test_every_selection_has_a_reason():
    for pick in selected_kernels("cpu"):
        assert pick.operation
        assert len(pick.reason) > 10


def test_the_selection_for_experts_is_a_grouped_gemm():
    assert select_grouped_gemm(torch.zeros(1)) in GROUPED_GEMMS.values()
    assert selected_kernels("cpu")[1].implementation in GROUPED_GEMMS


def test_a_device_whose_grouped_mm_fails_falls_back_with_the_reason():
    # there is no such device here, so the check fails
    (mixture, experts, *_) = selected_kernels("mps")
    assert mixture.implementation == "unfused"
    assert experts.implementation == "sequential"
    assert "did not run" in experts.reason
