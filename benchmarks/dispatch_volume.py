"""Communication volume of dispatch methods in closed form, compared with what a run counts.

All values are bytes that one rank sends in the forward pass of one layer, dispatch and combine;
backward sends the same again. Routing is taken to be even. Bytes are floats, so that shares of a
row need no rounding.

Letters: n ranks that share the experts, k experts per token, M nodes.
"""

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True, slots=True)
class DispatchedTokens:
    """What a rank dispatches in a layer: ``tokens`` rows of ``dim`` numbers, each to k experts."""

    tokens: int
    experts_per_token: int
    dim: int
    itemsize: int

    @property
    def total_bytes(self) -> float:
        """Bytes of one copy of a row for each of its experts."""
        return float(self.tokens * self.experts_per_token * self.dim * self.itemsize)


def all_to_all_bytes(tokens: DispatchedTokens, *, ranks: int) -> float:
    """Return the bytes of dispatch and combine over n ranks: ``2 k (n-1)/n`` rows per token."""
    return 2 * tokens.total_bytes * (ranks - 1) / ranks


def expert_tensor_bytes(tokens: DispatchedTokens, *, expert_tensor: int) -> float:
    """Return the bytes of the all-gather over an expert's slices and the reduce-scatter back."""
    return 2 * tokens.total_bytes * (expert_tensor - 1)


def all_to_all_inter_node_bytes(
    tokens: DispatchedTokens, *, ranks: int, ranks_per_node: int
) -> float:
    """Return the part of ``all_to_all_bytes`` that leaves a node of ``ranks_per_node`` ranks."""
    return 2 * tokens.total_bytes * (ranks - ranks_per_node) / ranks


@dataclass(frozen=True, slots=True)
class MeshAxisBytes:
    """Bytes over each axis of a (data, expert, model) mesh; ``data`` is of gradients, per step."""

    data: float
    expert: float
    model: float


def data_expert_model_bytes(
    tokens: DispatchedTokens, *, data: int, expert: int, model: int, expert_bytes: float
) -> MeshAxisBytes:
    """Return the volume of experts sharded over ``expert``, cut over ``model``, copied over
    ``data``.

    Du et al. 2024, arXiv:2405.15052: routing and capacity are local to a row of the data axis, so
    rows never leave the expert axis. The price is a sum of gradients over the copies:
    ``expert_bytes`` are those of all experts of the layer.
    """
    local = expert_bytes / (expert * model)
    return MeshAxisBytes(
        data=2 * local * (data - 1) / data,
        expert=all_to_all_bytes(tokens, ranks=expert),
        model=expert_tensor_bytes(tokens, expert_tensor=model),
    )


def mean_remote_nodes(*, experts: int, nodes: int, experts_per_token: int) -> float:
    """Return the mean number of *other* nodes that hold a token's experts, all k-sets alike.

    A node holds ``experts / nodes`` experts; the token misses it when all k are among the others.
    """
    missed = comb(experts - experts // nodes, experts_per_token) / comb(experts, experts_per_token)
    return (nodes - 1) * (1 - missed)


def hierarchical_inter_node_bytes(tokens: DispatchedTokens, *, experts: int, nodes: int) -> float:
    """Return the bytes that leave a node where a row crosses once for all its experts there."""
    crossings = mean_remote_nodes(
        experts=experts, nodes=nodes, experts_per_token=tokens.experts_per_token
    )
    return 2 * crossings * tokens.tokens * tokens.dim * tokens.itemsize


def gathered_expert_bytes(*, expert_bytes: float, ranks: int, gather_size: int) -> float:
    """Return the bytes of weights that a rank sends if ``gather_size`` ranks gather each other's.

    Hwang et al. 2023 (Tutel), arXiv:2206.03382: each rank stores 1/n of the layer's experts. In the
    forward pass ``gather_size`` of them gather theirs; backward sums the gradients, as many bytes.
    """
    return expert_bytes / ranks * (gather_size - 1)


def adaptive_experts_bytes(
    tokens: DispatchedTokens, *, expert_bytes: float, ranks: int, gather_size: int
) -> float:
    """Return weights and rows together: rows go to n / ``gather_size`` places only."""
    weights = gathered_expert_bytes(expert_bytes=expert_bytes, ranks=ranks, gather_size=gather_size)
    return weights + all_to_all_bytes(tokens, ranks=ranks // gather_size)
