"""Expert specialization: how strongly expert choice depends on language, token id or position.

``measure_specialization`` and ``routing_distance`` compare languages by p(expert | language); each
language has the same weight, however many tokens it has. ``conditional_entropy`` is the uncertainty
about a token's expert given its token id or position (OpenMoE, arXiv:2402.01739). Rare ids leave
little uncertainty by chance alone, so it is compared with that of ``shuffle_counts``.

Letters: M MoE layers, E experts, G languages, X values of the given input (token ids, positions).
"""

from dataclasses import dataclass

import numpy as np

_EPSILON = 1e-12


@dataclass(frozen=True, slots=True)
class LayerSpecialization:
    """Language specialization of one layer. Entropies are shares of their maximum.

    ``load_entropy`` is that of the experts over all languages, ``language_entropy`` its mean within
    one language: 1 is balanced, 0 is one expert. ``mutual_information`` of language and expert is
    in bits: 0 if routing ignores the language, at most ``log2(min(E, G))``. ``top_languages`` lists
    per expert the languages that use it most, each with its ratio to the average language.
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
    present = np.flatnonzero(np.asarray(counts).sum(0) > 0)
    share = expert_share_by_language(np.asarray(counts)[:, present])
    experts = share.shape[0]
    if not present.size:
        return LayerSpecialization(0.0, 0.0, 0.0, ((),) * experts)
    mean_share = share.mean(1)
    most = np.log2(experts) if experts > 1 else 1.0
    within = float(_entropy_bits(share, axis=0).mean())
    ratio = share / np.maximum(mean_share[:, None], _EPSILON)
    order = np.argsort(-ratio, axis=1, kind="stable")[:, :top]
    typical = tuple(
        tuple((int(present[g]), float(ratio[e, g])) for g in row if share[e, g] > 0)
        for e, row in enumerate(order)
    )
    total = float(_entropy_bits(mean_share, axis=0))
    return LayerSpecialization(total / most, within / most, max(0.0, total - within), typical)


def routing_distance(counts: np.ndarray) -> np.ndarray:
    """Return the distance between the routing of two languages, float64 [G, G] in 0..1.

    It is the Jensen-Shannon distance (the square root of the divergence in bits, a metric) between
    p(expert | language), averaged over the layers of counts [M, E, G].
    """
    share = expert_share_by_language(counts)
    one, other = share[..., :, None], share[..., None, :]
    between = _entropy_bits((one + other) / 2, axis=-3)
    entropy = _entropy_bits(share, axis=-2)
    divergence = between - (entropy[..., :, None] + entropy[..., None, :]) / 2
    distance = np.sqrt(np.maximum(divergence, 0.0)).mean(0)
    np.fill_diagonal(distance, 0.0)
    return distance


def _entropy_bits(share: np.ndarray, *, axis: int) -> np.ndarray:
    return -(share * np.log2(np.maximum(share, _EPSILON))).sum(axis)


def conditional_entropy(counts: np.ndarray) -> float:
    """Return the entropy of the expert given x, of counts [E, X], as a share of ``log2 E``.

    1: x does not predict the expert; 0: x determines it.
    """
    counts = np.asarray(counts, dtype=np.float64)
    edges = counts.sum(0)
    if counts.shape[0] < 2 or not edges.any():
        return 0.0
    entropy = _entropy_bits(counts / np.maximum(edges, 1), axis=0)
    return float((entropy * edges).sum() / edges.sum() / np.log2(counts.shape[0]))


def shuffle_counts(counts: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return counts [E, X] with the same sums over experts and over x, otherwise at random.

    This shuffles the values of x among the edges.
    """
    draw = np.random.default_rng(seed)
    remaining = np.asarray(counts).sum(1)
    shuffled = np.zeros_like(counts)
    for x, edges in enumerate(np.asarray(counts).sum(0).tolist()):
        if edges:
            shuffled[:, x] = draw.multivariate_hypergeometric(remaining, edges, method="marginals")
            remaining = remaining - shuffled[:, x]
    return shuffled


def characteristic_inputs(
    counts: np.ndarray, *, top: int = 8, min_count: int = 8
) -> tuple[tuple[int, ...], ...]:
    """Return per expert the x that are most characteristic of it, of counts [E, X].

    These are the x of at least ``min_count`` edges with the largest excess over the edges that the
    expert's load predicts, in units of the standard deviation of counts.
    """
    counts = np.asarray(counts, dtype=np.float64)
    edges = counts.sum(0)
    load_share = counts.sum(1, keepdims=True) / max(counts.sum(), 1)
    excess = (counts - load_share * edges) / np.sqrt(np.maximum(edges, 1))
    strength = np.where(edges >= min_count, excess, -np.inf)
    order = np.argsort(-strength, axis=1, kind="stable")[:, :top]
    return tuple(tuple(int(x) for x in row if strength[e, x] > 0) for e, row in enumerate(order))
