"""Traffic: the bytes that an MoE layer's rows and weights need on the wire, in closed form.

Arithmetic alone. Everything is what one rank sends in the forward pass of one layer, out and home;
the backward pass sends the same again. Routing is taken to be even; a ``Wire`` (``wire.py``) counts
the same numbers in a run. Bytes are floats, so that shares of a row need no rounding.

Letters: n ranks that share the experts, k experts per token, M nodes.
"""

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """What one rank brings to the layer: ``tokens`` rows of ``dim`` numbers, each for k experts."""

    tokens: int
    experts_per_token: int
    dim: int
    itemsize: int

    @property
    def total_bytes(self) -> float:
        """Bytes of one copy of a row for each of its experts."""
        return float(self.tokens * self.experts_per_token * self.dim * self.itemsize)


def all_to_all_bytes(rows: DispatchedTokens, *, ranks: int) -> float:
    """Out to experts on other ranks and home: ``2 k (n-1)/n`` rows per token."""
    return 2 * rows.total_bytes * (ranks - 1) / ranks


def all_to_all_inter_node_bytes(
    rows: DispatchedTokens, *, ranks: int, ranks_per_node: int
) -> float:
    """The part of ``all_to_all`` that leaves the node, if ``on_node`` of the ranks share one."""
    return 2 * rows.total_bytes * (ranks - ranks_per_node) / ranks


def expert_tensor_bytes(rows: DispatchedTokens, *, expert_tensor: int) -> float:
    """Rows gathered over the ranks that hold slices of an expert, partial answers summed back."""
    return 2 * rows.total_bytes * (expert_tensor - 1)


@dataclass(frozen=True, slots=True)
class MeshAxisBytes:
    """Bytes over each axis of a (data, expert, model) mesh; ``data`` is of gradients, per step."""

    data: float
    expert: float
    model: float


def data_expert_model_bytes(
    rows: DispatchedTokens, *, data: int, expert: int, model: int, expert_bytes: float
) -> MeshAxisBytes:
    """Experts sharded over ``expert``, cut over ``model``, copied over ``data``.

    Du et al. 2024, arXiv:2405.15052: routing and capacity are local to a row of the data axis, so
    rows never leave the expert axis. What is paid for it is a sum of gradients over the copies:
    ``expert_bytes`` are those of all experts of the layer.
    """
    local = expert_bytes / (expert * model)
    return MeshAxisBytes(
        data=2 * local * (data - 1) / data,
        expert=all_to_all_bytes(rows, ranks=expert),
        model=expert_tensor_bytes(rows, expert_tensor=model),
    )


def mean_remote_nodes(*, experts: int, nodes: int, experts_per_token: int) -> float:
    """Return how many *other* nodes a token's experts are on, on average, if all k-sets are alike.

    A node holds ``experts / nodes`` experts and is missed when all k are among the others.
    """
    missed = comb(experts - experts // nodes, experts_per_token) / comb(experts, experts_per_token)
    return (nodes - 1) * (1 - missed)


def hierarchical_inter_node_bytes(rows: DispatchedTokens, *, experts: int, nodes: int) -> float:
    """Bytes that leave a node where a token crosses once for all its experts there, and home."""
    once = mean_remote_nodes(experts=experts, nodes=nodes, experts_per_token=rows.experts_per_token)
    return 2 * once * rows.tokens * rows.dim * rows.itemsize


def gathered_expert_bytes(*, expert_bytes: float, ranks: int, gather_size: int) -> float:
    """Bytes of weights that a rank sends if ``together`` of the ranks lend each other theirs.

    Hwang et al. 2023 (Tutel), arXiv:2206.03382: each rank keeps 1/n of the layer's experts. Going
    forward ``together`` of them gather theirs; going back they sum the gradients, as many bytes.
    """
    return expert_bytes / ranks * (gather_size - 1)


def adaptive_experts_bytes(
    rows: DispatchedTokens, *, expert_bytes: float, ranks: int, gather_size: int
) -> float:
    """Rows and weights together: rows need only go to n / ``together`` places."""
    weights = gathered_expert_bytes(expert_bytes=expert_bytes, ranks=ranks, gather_size=gather_size)
    return weights + all_to_all_bytes(rows, ranks=ranks // gather_size)
