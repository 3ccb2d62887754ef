"""Repetition in generated text: block repeated n-grams, penalise repeated tokens, find loops.

Letters: R hypotheses, L tokens generated so far, V vocabulary.
"""

from collections.abc import Sequence
from itertools import groupby

from moesaic.core.shapes import Float, Int, Tensor

_LONGEST_UNIT = 16  # tokens of a passage whose repetition is looked for
_MIN_REPEATS, _MIN_TOKENS = 4, 8


def block_repeated_ngrams(
    log_prob: Float[Tensor, "R V"], *, ids: Int[Tensor, "R L"], size: int
) -> Float[Tensor, "R V"]:
    """Return ``log_prob`` with -inf for tokens that would repeat an n-gram of ``ids``.

    An n-gram of ``size`` tokens then occurs at most once in a row (Paulus et al. 2017,
    arXiv:1705.04304; ``no_repeat_ngram_size`` of fairseq and transformers). 0 blocks nothing.
    """
    length, vocab = ids.shape[1], log_prob.shape[1]
    if size == 0 or length < size:
        return log_prob
    ngrams = ids.unfold(1, size, 1)
    begun = ids[:, length - size + 1 :]
    repeats = (ngrams[..., :-1] == begun[:, None]).all(-1)
    # a column beside the vocabulary takes what is not blocked: writes to one cell never conflict
    token = ngrams[..., -1].where(repeats, vocab)
    blocked = log_prob.new_zeros(len(ids), vocab + 1).bool().scatter(1, token, value=True)
    return log_prob.masked_fill(blocked[:, :vocab], float("-inf"))


def penalise_repeated_tokens(
    logits: Float[Tensor, "R V"], *, ids: Int[Tensor, "R L"], penalty: float
) -> Float[Tensor, "R V"]:
    """Return ``logits`` with those of the tokens in ``ids`` divided by ``penalty``.

    Negative ones are multiplied by it, so that a penalty above 1 always lowers a logit (CTRL,
    Keskar et al. 2019, arXiv:1909.05858). 1 changes nothing.
    """
    if penalty == 1 or not ids.shape[1]:
        return logits
    found = logits.gather(1, ids)
    return logits.scatter(1, ids, (found * penalty).where(found < 0, found / penalty))


def count_repeats(ids: Sequence[int]) -> int:
    """Return how often a passage of up to 16 tokens is repeated without a break: 1 if never.

    Only passages that cover at least 8 tokens with all their copies are counted.
    """
    most = 1
    for unit in range(1, min(_LONGEST_UNIT, len(ids) // 2) + 1):
        same = [a == b for a, b in zip(ids, ids[unit:], strict=False)]
        run = max((len(list(group)) for value, group in groupby(same) if value), default=0)
        copies = run // unit + 1
        if copies * unit >= _MIN_TOKENS:
            most = max(most, copies)
    return most


def is_loop(ids: Sequence[int], *, source: Sequence[int]) -> bool:
    """Return whether an answer repeats a passage again and again where its source does not.

    At least four copies, and more than twice as many as the most that the source has.
    """
    copies = count_repeats(ids)
    return copies >= _MIN_REPEATS and copies > 2 * count_repeats(source)
