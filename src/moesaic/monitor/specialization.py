"""Affinity: what counts of routed tokens say about experts and languages.

Languages count equally, however many tokens each has: every measure is of p(expert | language).

Letters: M MoE layers, E experts, G languages.

Insight: what an expert's tokens have in common, from counts (OpenMoE, arXiv:2402.01739).

Knowing a token's id (or its position) leaves some uncertainty about its expert; ids dealt out
anew at random leave as much as chance gives: the rarer an id, the less. The difference is what
the router reads from it.

Letters: E experts, X values of what is known (vocabulary ids, positions).
"""

from dataclasses import dataclass

import numpy as np

_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class LayerSpecialization:
    """One layer. Entropies are shares of the maximum: 1 is even, 0 is one expert for everything.

    ``load_entropy`` is of the experts over all languages, ``language_entropy`` the mean within one
    language, ``mutual_information`` the mutual information of language and expert in bits: 0 when routing
    ignores the language, at most ``log2(min(E, G))``. ``typical`` lists per expert the languages
    that use it most, relative to the others, with that ratio (1 is the average language).
    """

    load_entropy: float
    language_entropy: float
    mutual_information: float
    top_languages: tuple[tuple[tuple[int, float], ...], ...]


def expert_share_by_language(counts: np.ndarray) -> np.ndarray:
    """Return p(expert | language) of counts [..., E, G]; zero where a language has no tokens."""
    counts = np.asarray(counts, dtype=np.float64)
    return counts / np.maximum(counts.sum(-2, keepdims=True), _EPSILON)


def measure_specialization(counts: np.ndarray, *, top: int = 3) -> LayerSpecialization:
    """Measure one layer's counts [E, G]. Languages without tokens are left out."""
    heard = np.flatnonzero(np.asarray(counts).sum(0) > 0)
    share = expert_share_by_language(np.asarray(counts)[:, heard])
    experts = share.shape[0]
    if not heard.size:
        return LayerSpecialization(0.0, 0.0, 0.0, ((),) * experts)
    overall = share.mean(1)
    most = np.log2(experts) if experts > 1 else 1.0
    within = float(_entropy_bits(share, axis=0).mean())
    ratio = share / np.maximum(overall[:, None], _EPSILON)
    order = np.argsort(-ratio, axis=1, kind="stable")[:, :top]
    typical = tuple(
        tuple((int(heard[g]), float(ratio[e, g])) for g in row if share[e, g] > 0)
        for e, row in enumerate(order)
    )
    total = float(_entropy_bits(overall, axis=0))
    return LayerSpecialization(total / most, within / most, max(0.0, total - within), typical)


def routing_distance(counts: np.ndarray) -> np.ndarray:
    """Return how differently languages are routed, float64 [G, G] in 0..1.

    The Jensen-Shannon distance (the square root of the divergence in bits, a metric) between
    p(expert | language), averaged over the layers of counts [M, E, G].
    """
    share = expert_share_by_language(counts)
    one, other = share[..., :, None], share[..., None, :]
    between = _entropy_bits((one + other) / 2, axis=-3)
    own = _entropy_bits(share, axis=-2)
    divergence = between - (own[..., :, None] + own[..., None, :]) / 2
    distance = np.sqrt(np.maximum(divergence, 0.0)).mean(0)
    np.fill_diagonal(distance, 0.0)
    return distance


def _entropy_bits(share: np.ndarray, *, axis: int) -> np.ndarray:
    return -(share * np.log2(np.maximum(share, _EPSILON))).sum(axis)


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


def characteristic_inputs(
    counts: CountTable, *, top: int = 8, min_count: int = 8
) -> tuple[tuple[int, ...], ...]:
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
