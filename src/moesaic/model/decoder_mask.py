"""Decoder mask: which tokens of its row a token of the decoder reads."""

from typing import ClassVar

from moesaic.core.config import Choice


class DecoderMask(Choice):
    """Family: ``CausalMask`` or ``FullMask``."""

    causal: ClassVar[bool] = True


class CausalMask(DecoderMask):
    """Itself and those before it, as generation needs."""


class FullMask(DecoderMask):
    """All of them: for heads that predict whole rows (classes, noise of an image)."""

    causal = False
