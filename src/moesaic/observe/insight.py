"""Insight: what an expert's tokens have in common, from counts (OpenMoE, arXiv:2402.01739).

Knowing a token's id (or its position) leaves some uncertainty about its expert; ids dealt out
anew at random leave as much as chance gives: the rarer an id, the less. The difference is what
the router reads from it.

Letters: E experts, X values of what is known (vocabulary ids, positions).
"""

import numpy as np

CountTable = np.ndarray


def conditional_entropy(counts: CountTable) -> float:
    """Return the mean entropy of p(expert | x) of counts [E, X], as a share of ``log2 E``.

    Each x weighs as many edges as it has: 1 is no idea, 0 is certainty.
    """
    counts = np.asarray(counts, dtype=np.float64)
    known = counts.sum(0)
    if counts.shape[0] < 2 or not known.any():
        return 0.0
    share = counts / np.maximum(known, 1)
    entropy = -(share * np.log2(np.where(share > 0, share, 1))).sum(0)
    return float((entropy * known).sum() / known.sum() / np.log2(counts.shape[0]))


def shuffle_counts(counts: CountTable, *, seed: int = 0) -> CountTable:
    """Return counts [E, X] with the same sums over experts and over x, otherwise at random.

    As if the values of x were shuffled among the edges.
    """
    draw = np.random.default_rng(seed)
    left = np.asarray(counts).sum(1)
    dealt = np.zeros_like(counts)
    for x, wanted in enumerate(np.asarray(counts).sum(0).tolist()):
        if wanted:
            dealt[:, x] = draw.multivariate_hypergeometric(left, wanted, method="marginals")
            left = left - dealt[:, x]
    return dealt


def characteristic_inputs(counts: CountTable, *, top: int = 8, min_count: int = 8) -> tuple[tuple[int, ...], ...]:
    """Return per expert the x that are most its own, of counts [E, X].

    Those of at least ``enough`` edges with the largest share there, against the expert's share of
    all edges, weighed by how many edges say so.
    """
    counts = np.asarray(counts, dtype=np.float64)
    known = counts.sum(0)
    fair = counts.sum(1, keepdims=True) / max(counts.sum(), 1)
    surplus = counts - fair * known  # edges beyond those that chance would send
    strength = np.where(known >= min_count, surplus / np.sqrt(np.maximum(known, 1)), -np.inf)
    order = np.argsort(-strength, axis=1, kind="stable")[:, :top]
    return tuple(tuple(int(x) for x in row if strength[e, x] > 0) for e, row in enumerate(order))
