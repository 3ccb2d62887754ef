"""Synthetic preferences over real texts: a task whose pairs are ordered by a known gold reward.

The gold reward of a text is a sum of capabilities, each a squashed sum over its tokens of weights
drawn from a hash. Tasks weigh the same capabilities differently, so what one task prefers another
may not. Labels of training pairs are flipped with a given probability; held-out pairs never.
Letters: B texts, C capabilities.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from moesaic.data.numpy_counter_rng import random_permutation, random_uniform
from moesaic.data.ragged import Ragged
from moesaic.data.series import FloatArray
from moesaic.data.tasks import Task, TaskStream
from moesaic.data.token_shards import PairRows, TokenShards

_TOKEN, _TASK, _FLIP, _PARTNER = 61, 62, 63, 64
CAPABILITIES = 4
_TEXTS_AT_ONCE = 65536


class Preferences(Task):
    """Pairs of texts of a language, the source preferred to the target by task ``number``.

    ``noise`` is the share of training pairs with the order reversed (25 to 40 % of human labels
    contradict each other, DMoERM, 2403.01197, section 1). For heads that compare two texts
    (``PairCollator``).
    """

    number: int = Field(ge=0)
    noise: float = Field(default=0.3, ge=0, lt=0.5)
    languages: tuple[str, ...] = ()
    """Only these; empty: all."""

    @property
    def name(self) -> str:
        return f"preferences-{self.number}"

    def streams(
        self, shards: TokenShards, *, languages: Sequence[str], split: str
    ) -> list[TaskStream]:
        chosen = set(self.languages or languages) & set(languages) & set(shards.languages)
        return [TaskStream(c, c, self._pairs(shards, c, split=split)) for c in sorted(chosen)]

    def gold_reward(self, rows: Ragged) -> FloatArray:
        """Return the gold reward [B] of texts under this task."""
        weights = 2 * random_uniform(_TASK, self.number, np.arange(CAPABILITIES)) - 1
        return capability_scores(rows) @ weights

    def _pairs(self, shards: TokenShards, code: str, *, split: str) -> PairRows:
        texts = shards.text_rows(code, split=split)
        number = np.arange(texts.size)
        if texts.size < 2:
            return PairRows(np.zeros((0, 2), dtype=np.uint32), 0, 0)
        # neighbours in a permutation are never the same text
        order = random_permutation(number, size=texts.size, key=_PARTNER)
        first, second = order, np.roll(order, 1)
        ids = texts.start + number
        parts = np.array_split(ids, -(-texts.size // _TEXTS_AT_ONCE))
        gold = np.concatenate([self.gold_reward(shards.gather(part)) for part in parts])
        preferred = gold[first] >= gold[second]
        if split == "train":
            preferred ^= random_uniform(_FLIP, self.number, first) < self.noise
        better, worse = np.where(preferred, (first, second), (second, first))
        pairs = texts.start + np.stack([better, worse], axis=1)
        return PairRows(pairs.astype(np.uint32), 0, texts.num_tokens)


def capability_scores(rows: Ragged) -> FloatArray:
    """Return the capabilities [B, C] of texts, each between -1 and 1."""
    weight = 2 * random_uniform(_TOKEN, rows.tokens[:, None], np.arange(CAPABILITIES)) - 1
    total = np.concatenate([np.zeros((1, CAPABILITIES)), np.cumsum(weight, axis=0)])
    ends = np.cumsum(rows.lengths)
    sums = total[ends] - total[ends - rows.lengths]
    return np.tanh(2 * sums / np.sqrt(np.maximum(rows.lengths, 1))[:, None])
