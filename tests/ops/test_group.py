"""Groups: a stable sort by expert, with dropped edges last."""

import torch

from moesaic.ops.permute import group_by_expert


def test_edges_are_sorted_by_expert_and_keep_their_order_within_it():
    expert = torch.tensor([2, 0, 3, 2, 0, 3])  # 3 of 3 experts: dropped
    groups = group_by_expert(expert, num_experts=3)
    assert groups.order.tolist() == [1, 4, 0, 3, 2, 5]
    assert groups.rows_per_expert.tolist() == [2, 0, 2]
    assert groups.offsets.tolist() == [2, 2, 4]
    assert groups.offsets.dtype == torch.int32


def test_place_is_the_inverse_of_order():
    groups = group_by_expert(torch.randint(0, 5, (100,)), num_experts=4)
    assert torch.equal(groups.inverse[groups.order], torch.arange(100))


def test_no_edges_are_no_rows():
    groups = group_by_expert(torch.empty(0, dtype=torch.long), num_experts=3)
    assert groups.offsets.tolist() == [0, 0, 0]
