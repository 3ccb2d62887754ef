"""Ranking metrics: recall of retrieval, and the gold reward of best-of-n selection.

Letters: N queries, D dimensions, P prompts, C candidates of a prompt.
"""

from collections.abc import Sequence
from math import comb

import torch

from moesaic.core.shapes import Float, Tensor


def recall_at_1(queries: Float[Tensor, "N D"], *, candidates: Float[Tensor, "N D"]) -> float:
    """Return the share of queries whose own candidate has the highest cosine of all.

    The own candidate is that of the same row. A tie with another candidate counts as a miss.
    """
    if not len(queries):
        raise ValueError("found no queries, expected one or more")
    similarity = torch.nn.functional.normalize(queries.double(), dim=-1)
    similarity = similarity @ torch.nn.functional.normalize(candidates.double(), dim=-1).T
    own = similarity.diagonal().clone()
    others = similarity.fill_diagonal_(-torch.inf).amax(1)
    return float((own > others).double().mean())


def best_of_n_curve(
    proxy: Float[Tensor, "P C"], *, gold: Float[Tensor, "P C"], counts: Sequence[int]
) -> list[float]:
    """Return the mean gold reward of the best by ``proxy`` of n candidates, for each n of counts.

    The mean is over prompts and over all sets of n of the C candidates, exactly: the j-th of C by
    ``proxy``, from the lowest, is the best of n with probability (j-1 choose n-1) / (C choose n).
    Over-optimisation is where it falls with n (Gao et al. 2022, 2210.10760).
    """
    candidates = proxy.shape[1]
    ranked = gold.double().gather(1, proxy.argsort(dim=1)).mean(0)
    curve = []
    for n in counts:
        if not 1 <= n <= candidates:
            raise ValueError(f"found n={n}, expected 1 to {candidates} candidates")
        total = comb(candidates, n)
        weights = [comb(j, n - 1) / total for j in range(candidates)]
        curve.append(float(ranked @ torch.tensor(weights, dtype=torch.float64)))
    return curve
