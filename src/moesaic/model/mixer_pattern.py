"""Mixer patterns: which sequence mixers each block of a stack has, as a short text.

``"full, window, window"`` is repeated over the blocks. An entry is one block:

================  ==================================================================================
``a``             a residual branch of the mixer ``a``, then the feed-forward
``a > b``         two residual branches, one after the other, then the feed-forward
``a | b``         one residual branch: both mixers on one input, norms of their outputs summed
``a-``            without the feed-forward
================  ==================================================================================

``|`` binds more tightly than ``>``. Names are keys of ``ModelConfig.mixers``.
"""

import re
from dataclasses import dataclass
from functools import cache

DEFAULT_MIXER = "attention"
MAX_PATTERN_LENGTH = 1 << 16
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """One block: the names of the mixers of each residual branch, and if it has a feed-forward.

    A branch of several names has them in parallel.
    """

    branches: tuple[tuple[str, ...], ...]
    feed_forward: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all mixers, in order."""
        return tuple(name for branch in self.branches for name in branch)

    def __str__(self) -> str:
        return " > ".join(map(" | ".join, self.branches)) + "-" * (not self.feed_forward)


@cache
def parse_pattern(text: str) -> tuple[BlockPattern, ...]:
    """Return the blocks of a pattern. Raises ValueError with what is expected."""
    if len(text) > MAX_PATTERN_LENGTH:
        raise ValueError(f"found {len(text)} characters, expected {MAX_PATTERN_LENGTH} at most")
    return tuple(map(_parse_block, text.split(",")))


def _parse_block(entry: str) -> BlockPattern:
    words = entry.strip()
    feed_forward = not words.endswith("-")
    branches = tuple(
        tuple(name.strip() for name in branch.split("|"))
        for branch in words.removesuffix("-").split(">")
    )
    block = BlockPattern(branches, feed_forward)
    if not all(map(NAME.fullmatch, block.names)):
        raise ValueError(
            f"found {entry.strip()!r}, expected names of mixers separated by commas, each block "
            "such as a, a > b, a | b or a-"
        )
    return block
