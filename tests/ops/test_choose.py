"""Every pick names an implementation that exists and says why."""

import torch

from moesaic.ops.choose import ENGINES, pick_engine, picks


def test_every_pick_has_a_reason():
    for pick in picks("cpu"):
        assert pick.op
        assert len(pick.reason) > 10


def test_the_pick_for_experts_is_an_engine():
    assert pick_engine(torch.zeros(1)) in ENGINES.values()
    assert picks("cpu")[1].implementation in ENGINES


def test_a_device_whose_grouped_mm_fails_falls_back_and_says_so():
    (mixture, experts, _) = picks("mps")  # there is no such device here, so the probe fails
    assert mixture.implementation == "composed"
    assert experts.implementation == "segments"
    assert "did not run" in experts.reason
