"""Pieces: the parameters of a part as arithmetic, so that a model is counted without being made."""

from dataclasses import dataclass

from moesaic.nn.feed_forward import FeedForwardConfig


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter: its kind (``matrix``, ``expert``, ``router``, ``bias``) and shape.

    ``used`` is the share of it that one token multiplies with, and ``times`` how often it does.
    """

    kind: str
    shape: tuple[int, ...]
    active_fraction: float = 1.0
    uses_per_token: float = 1.0


def feed_forward_parameter_specs(
    feed_forward: FeedForwardConfig, *, dim: int, bias: bool
) -> list[ParameterSpec]:
    """Return the parameters of a dense feed-forward."""
    width = feed_forward.activation.width(feed_forward.hidden)
    pieces = [
        ParameterSpec("matrix", (width, dim)),
        ParameterSpec("matrix", (dim, feed_forward.hidden)),
    ]
    return (
        [*pieces, ParameterSpec("bias", (width,)), ParameterSpec("bias", (dim,))]
        if bias
        else pieces
    )
