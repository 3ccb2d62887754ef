"""Closed forms agree with each other where they say the same."""

from itertools import combinations
from math import comb

import pytest

from moesaic.dist.traffic import (
    Rows,
    adaptive,
    all_to_all,
    all_to_all_leaving,
    nodes_met,
    shared_weights,
    slices,
    three_d,
    two_hops_leaving,
)

ROWS = Rows(tokens=64, per_token=2, dim=16, itemsize=4)


def test_what_leaves_a_node_is_everything_where_a_node_is_a_rank() -> None:
    assert all_to_all_leaving(ROWS, ranks=8, on_node=1) == all_to_all(ROWS, ranks=8)
    assert all_to_all_leaving(ROWS, ranks=8, on_node=8) == 0


def test_three_d_with_one_row_and_no_cuts_is_expert_parallelism_over_all() -> None:
    mesh = three_d(ROWS, data=1, expert=8, model=1, expert_bytes=1e6)
    assert (mesh.data, mesh.expert, mesh.model) == (0, all_to_all(ROWS, ranks=8), 0)


def test_rows_travel_as_far_as_the_expert_axis_whatever_the_world() -> None:
    few, many = (three_d(ROWS, data=data, expert=4, model=2, expert_bytes=1e6) for data in (1, 64))
    assert few.expert == many.expert
    assert few.model == many.model == slices(ROWS, cuts=2)


@pytest.mark.parametrize(("experts", "nodes", "per_token"), [(8, 2, 2), (8, 4, 3), (12, 3, 5)])
def test_nodes_met_is_the_mean_over_all_sets_of_experts(
    experts: int, nodes: int, per_token: int
) -> None:
    each = experts // nodes
    sets = combinations(range(experts), per_token)
    met = sum(len({e // each for e in chosen} - {0}) for chosen in sets)
    assert nodes_met(experts=experts, nodes=nodes, per_token=per_token) == pytest.approx(
        met / comb(experts, per_token)
    )


def test_one_expert_per_token_leaves_nothing_to_save_by_hops() -> None:
    rows = Rows(tokens=64, per_token=1, dim=16, itemsize=4)
    flat = all_to_all_leaving(rows, ranks=8, on_node=4)
    assert two_hops_leaving(rows, experts=32, nodes=2) == pytest.approx(flat)
    assert two_hops_leaving(ROWS, experts=32, nodes=2) < all_to_all_leaving(
        ROWS, ranks=8, on_node=4
    )


def test_lending_weights_to_all_leaves_no_row_to_send() -> None:
    assert adaptive(ROWS, expert_bytes=8e3, ranks=8, together=8) == 7e3
    assert adaptive(ROWS, expert_bytes=8e3, ranks=8, together=1) == all_to_all(ROWS, ranks=8)
    half = adaptive(ROWS, expert_bytes=8e3, ranks=8, together=2)
    assert half == shared_weights(expert_bytes=8e3, ranks=8, together=2) + all_to_all(ROWS, ranks=4)
