"""Parameter specs: kinds and shapes of parameters, to count a model without building it."""

from dataclasses import dataclass

from moesaic.nn.feed_forward import FeedForwardConfig


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter: its kind (``matrix``, ``expert``, ``router``, ``bias``, ``norm``) and shape.

    ``active_fraction`` is the share of it that one token uses, ``uses_per_token`` how often.
    """

    kind: str
    shape: tuple[int, ...]
    active_fraction: float = 1.0
    uses_per_token: float = 1.0


def linear_specs(inputs: int, outputs: int, *, bias: bool) -> list[ParameterSpec]:
    """Return the parameters of an ``nn.Linear``."""
    biases = [ParameterSpec("bias", (outputs,))] if bias else []
    return [ParameterSpec("matrix", (outputs, inputs)), *biases]


@dataclass(frozen=True, slots=True)
class FeedForwardShape:
    """A feed-forward in a model of dim ``dim``, with or without biases."""

    dim: int
    feed_forward: FeedForwardConfig
    bias: bool

    @property
    def hidden(self) -> int:
        return self.feed_forward.hidden

    @property
    def width(self) -> int:
        """The width of the up projection: twice ``hidden`` for a gated activation."""
        return self.feed_forward.activation.width(self.hidden)

    def parameter_specs(self) -> list[ParameterSpec]:
        """Return the parameters of the dense feed-forward."""
        specs = [
            ParameterSpec("matrix", (self.width, self.dim)),
            ParameterSpec("matrix", (self.dim, self.hidden)),
        ]
        if self.bias:
            specs += [ParameterSpec("bias", (self.width,)), ParameterSpec("bias", (self.dim,))]
        return specs
