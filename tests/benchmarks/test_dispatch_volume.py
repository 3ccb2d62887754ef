"""Closed forms agree with each other in special cases."""

from itertools import combinations
from math import comb

import pytest
from dispatch_volume import (
    DispatchedTokens,
    adaptive_experts_bytes,
    all_to_all_bytes,
    all_to_all_inter_node_bytes,
    data_expert_model_bytes,
    expert_tensor_bytes,
    gathered_expert_bytes,
    hierarchical_inter_node_bytes,
    mean_remote_nodes,
)

ROWS = DispatchedTokens(tokens=64, experts_per_token=2, dim=16, itemsize=4)


def test_with_nodes_of_one_rank_all_bytes_are_between_nodes() -> None:
    assert all_to_all_inter_node_bytes(ROWS, ranks=8, ranks_per_node=1) == all_to_all_bytes(
        ROWS, ranks=8
    )
    assert all_to_all_inter_node_bytes(ROWS, ranks=8, ranks_per_node=8) == 0


def test_a_mesh_of_one_axis_is_expert_parallelism() -> None:
    mesh = data_expert_model_bytes(ROWS, data=1, expert=8, model=1, expert_bytes=1e6)
    assert (mesh.data, mesh.expert, mesh.model) == (0, all_to_all_bytes(ROWS, ranks=8), 0)


def test_rows_stay_on_the_expert_axis_for_any_world_size() -> None:
    few, many = (
        data_expert_model_bytes(ROWS, data=data, expert=4, model=2, expert_bytes=1e6)
        for data in (1, 64)
    )
    assert few.expert == many.expert
    assert few.model == many.model == expert_tensor_bytes(ROWS, expert_tensor=2)


@pytest.mark.parametrize(("experts", "nodes", "per_token"), [(8, 2, 2), (8, 4, 3), (12, 3, 5)])
def test_mean_remote_nodes_is_the_mean_over_all_sets_of_experts(
    experts: int, nodes: int, per_token: int
) -> None:
    each = experts // nodes
    sets = combinations(range(experts), per_token)
    met = sum(len({e // each for e in chosen} - {0}) for chosen in sets)
    assert mean_remote_nodes(
        experts=experts, nodes=nodes, experts_per_token=per_token
    ) == pytest.approx(met / comb(experts, per_token))


def test_with_one_expert_per_token_hierarchical_saves_nothing() -> None:
    rows = DispatchedTokens(tokens=64, experts_per_token=1, dim=16, itemsize=4)
    flat = all_to_all_inter_node_bytes(rows, ranks=8, ranks_per_node=4)
    assert hierarchical_inter_node_bytes(rows, experts=32, nodes=2) == pytest.approx(flat)
    assert hierarchical_inter_node_bytes(ROWS, experts=32, nodes=2) < all_to_all_inter_node_bytes(
        ROWS, ranks=8, ranks_per_node=4
    )


def test_gathering_all_weights_sends_no_rows() -> None:
    assert adaptive_experts_bytes(ROWS, expert_bytes=8e3, ranks=8, gather_size=8) == 7e3
    assert adaptive_experts_bytes(
        ROWS, expert_bytes=8e3, ranks=8, gather_size=1
    ) == all_to_all_bytes(ROWS, ranks=8)
    half = adaptive_experts_bytes(ROWS, expert_bytes=8e3, ranks=8, gather_size=2)
    assert half == gathered_expert_bytes(
        expert_bytes=8e3, ranks=8, gather_size=2
    ) + all_to_all_bytes(ROWS, ranks=4)
