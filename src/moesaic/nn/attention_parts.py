"""Parts of attention that a config chooses: windows and sinks.

Letters: H heads.
"""

from typing import Self

from pydantic import Field

from moesaic.core.config import Choice
from moesaic.nn.attention_scores import AttentionMask


class Window(Choice):
    """Family: which tokens of its row a token attends to, apart from causality."""

    def mask(self, *, causal: bool) -> AttentionMask:
        """Return the mask of a stack whose tokens attend to earlier ones only, or to all."""
        raise NotImplementedError

    def shrink(self) -> Self:
        """Return the same with a small size, for fast comparisons of short rows."""
        return self


class NoWindow(Window):
    """Every token of the row."""

    def mask(self, *, causal: bool) -> AttentionMask:
        return AttentionMask(causal)


class SlidingWindow(Window):
    """Tokens at a distance below ``size`` (Longformer, 2004.05150; Mistral, 2310.06825).

    In a decoder: the last ``size`` tokens with the token itself, of which alone the cache of
    decoding keeps keys and values.
    """

    size: int = Field(ge=1)

    def mask(self, *, causal: bool) -> AttentionMask:
        return AttentionMask(causal, window=self.size)

    def shrink(self) -> Self:
        return self.replace(size=min(self.size, 3))


class Chunks(Window):
    """Tokens of the same chunk: rows are cut into chunks of ``size`` tokens (Llama 4)."""

    size: int = Field(ge=1)

    def mask(self, *, causal: bool) -> AttentionMask:
        return AttentionMask(causal, chunk=self.size)

    def shrink(self) -> Self:
        return self.replace(size=min(self.size, 3))


class Sinks(Choice):
    """Family: what the weights of a query add up to.

    ``learned``: each head has a logit without a value in its softmax.
    """

    @property
    def learned(self) -> bool:
        """Whether each head has a learned logit."""
        return False


class NoSinks(Sinks):
    """Softmax over the keys: weights add up to 1."""


class LearnedSinks(Sinks):
    """A learned logit per head in each softmax, without a value (GPT-OSS, 2508.10925; 2309.17453).

    A head may thus attend to nothing. The logits start at zero.
    """

    @property
    def learned(self) -> bool:
        return True
