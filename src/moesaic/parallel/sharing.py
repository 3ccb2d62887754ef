"""Sharing: where the copies of a parameter lie, and how ZeRO shares them out."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GradientSync:
    """Over which axes the copies of a parameter lie, and the ranks that share out each copy.

    ``axes`` are summed after backward; ``zero`` are those that ZeRO has summed and shared out.
    """

    all_reduce_axes: tuple[str, ...]
    zero_axes: tuple[str, ...] = ()


def zero_dim(shape: tuple[int, ...], *, ranks: int) -> int:
    """Return the dim along which ZeRO shares out a parameter: the first, where it is long enough.

    A bank of fewer experts than ranks is shared out along its second dim, if that divides evenly.
    """
    if shape and shape[0] < ranks and len(shape) > 2 and shape[1] % ranks == 0:
        return 1
    return 0
