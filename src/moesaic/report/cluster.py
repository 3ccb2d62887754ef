"""Clusters: average-linkage trees of a distance matrix (Sokal and Michener 1958, UPGMA).

Letters: G leaves.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ClusterLeaf:
    """One item of the distance matrix."""

    index: int

    @property
    def height(self) -> float:
        return 0.0

    @property
    def leaves(self) -> tuple[int, ...]:
        return (self.index,)


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """Two trees that meet at a distance. ``leaves`` is the order in which a picture shows them."""

    left: "ClusterTree"
    right: "ClusterTree"
    height: float
    leaves: tuple[int, ...]


ClusterTree = ClusterLeaf | ClusterNode


def average_linkage(distance: np.ndarray) -> ClusterTree:
    """Join the nearest two trees until one is left; ties go to the earlier items. O(G^3).

    ``distance`` is [G, G], symmetric, G >= 1.
    """
    trees: list[ClusterTree] = [ClusterLeaf(i) for i in range(len(distance))]
    between = np.array(distance, dtype=np.float64)
    np.fill_diagonal(between, np.inf)
    while len(trees) > 1:
        a, b = sorted(int(i) for i in divmod(int(np.argmin(between)), len(trees)))
        height = float(between[a, b])
        sizes = len(trees[a].leaves), len(trees[b].leaves)
        merged = (between[a] * sizes[0] + between[b] * sizes[1]) / sum(sizes)
        joined = _merge_clusters(trees[a], trees[b], height=height)
        between[a], between[:, a] = merged, merged
        between[a, a] = np.inf
        between = np.delete(np.delete(between, b, axis=0), b, axis=1)
        trees[a] = joined
        del trees[b]
    return trees[0]


def _merge_clusters(one: ClusterTree, other: ClusterTree, *, height: float) -> ClusterNode:
    """Put the tree that holds the earliest item first, so that pictures of runs look alike."""
    left, right = (one, other) if min(one.leaves) < min(other.leaves) else (other, one)
    return ClusterNode(left, right, height, left.leaves + right.leaves)
