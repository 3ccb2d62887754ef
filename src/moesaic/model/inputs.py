"""Model inputs: token ids, points of a series, vectors, or patches of an image, to hidden states.

``ModelConfig.input`` chooses one; its module is the model's ``embedding``. Values that are no ids
come as ``InputRows`` of [B, S, C].

Letters: B rows, S length, T tokens, t tokens of this rank, C channels, D model dim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.embedding import Embedding, EmbeddingConfig
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec

TIME_CHANNELS = 64  # sines and cosines of a time in [0, 1]
_LONGEST_PERIOD = 10_000.0


@dataclass(frozen=True, slots=True)
class InputShape:
    """What an input may read of the model: the table of a vocabulary is one of its choices."""

    dim: int
    vocab_size: int
    embedding: EmbeddingConfig


class InputModule(CustomInitializers):
    """Base of modules that turn values into hidden states; optimizers see embeddings."""

    def initializers(self) -> Mapping[str, Initializer]:
        kinds = {name: parameter.dim() > 1 for name, parameter in self.named_parameters()}
        return {name: Initializer("embedding") for name, matrix in kinds.items() if matrix}

    def forward(self, values: Float[Tensor, "T C"], *, packing: Packing) -> Float[Tensor, "t D"]:
        """Return the states of this rank's tokens, given the values of all tokens."""
        raise NotImplementedError


class ModelInput(Choice):
    """Family: what the stacks of a model read."""

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of a token's value in a batch: (channels,), or () for an id."""
        raise NotImplementedError

    def build(self, shape: InputShape, /) -> Embedding | InputModule:
        """Return the module."""
        raise NotImplementedError

    def parameter_specs(self, shape: InputShape, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the module, to count a model without building it."""
        raise NotImplementedError


class TokenIds(ModelInput):
    """Ids of a vocabulary, by a table that the head may share (``ModelConfig.embedding``)."""

    @property
    def value_shape(self) -> tuple[int, ...]:
        return ()

    def build(self, shape: InputShape, /) -> Embedding:
        return Embedding(shape.embedding, vocab_size=shape.vocab_size, dim=shape.dim)

    def parameter_specs(self, shape: InputShape, /) -> Sequence[ParameterSpec]:
        tables = 1 if shape.embedding.tied else 2
        return tables * [ParameterSpec("embedding", (shape.vocab_size, shape.dim))]


class Vectors(ModelInput):
    """Given vectors (features, embeddings of another model), by a linear map."""

    channels: int = Field(ge=1)

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.channels,)

    def build(self, shape: InputShape, /) -> InputModule:
        return VectorEmbedding(self.channels, shape.dim)

    def parameter_specs(self, shape: InputShape, /) -> Sequence[ParameterSpec]:
        matrix = ParameterSpec("embedding", (shape.dim, self.channels))
        return [matrix, ParameterSpec("bias", (shape.dim,))]


class PointValues(ModelInput):
    """Points of a series, each a token, by a gated linear unit (Time-MoE, 2409.16040, 3.1)."""

    channels: int = Field(default=1, ge=1)

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.channels,)

    def build(self, shape: InputShape, /) -> InputModule:
        return PointEmbedding(self.channels, shape.dim)

    def parameter_specs(self, shape: InputShape, /) -> Sequence[ParameterSpec]:
        return 2 * [ParameterSpec("embedding", (shape.dim, self.channels))]


class Patches(ModelInput):
    """Patches of an image with a time and a class, added to each (DiT, 2212.09748, in context).

    A token's values are ``channels`` of the patch, the time in [0, 1], and the number of the class
    (``classes`` is none): ``with_condition`` makes them.
    """

    channels: int = Field(ge=1)
    classes: int = Field(default=0, ge=0)

    @property
    def value_shape(self) -> tuple[int, ...]:
        return (self.channels,)

    def build(self, shape: InputShape, /) -> InputModule:
        return PatchEmbedding(self.channels, shape.dim, classes=self.classes)

    def parameter_specs(self, shape: InputShape, /) -> Sequence[ParameterSpec]:
        dim = shape.dim
        matrices = ((dim, self.channels), (dim, TIME_CHANNELS), (dim, dim))
        specs = [ParameterSpec("embedding", matrix) for matrix in matrices]
        specs += [ParameterSpec("bias", (dim,))] * 3
        return [*specs, ParameterSpec("embedding", (self.classes + 1, dim))]


def _require_channels(values: Tensor, channels: int) -> None:
    if values.shape[1:] != (channels,):
        found = f"values of shape {list(values.shape[1:])}"
        raise ConfigError(
            [f"model.input expects {channels} channels of each token, but data gives {found}"]
        )


class VectorEmbedding(InputModule):
    """``W x + b`` of each vector."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)

    def forward(self, values: Float[Tensor, "T C"], *, packing: Packing) -> Float[Tensor, "t D"]:
        _require_channels(values, self.linear.in_features)
        return self.linear(values[packing.local_tokens].to(self.linear.weight.dtype))


class PointEmbedding(InputModule):
    """``silu(W x) * (V x)`` of each point."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, dim, bias=False)
        self.value = nn.Linear(channels, dim, bias=False)

    def forward(self, values: Float[Tensor, "T C"], *, packing: Packing) -> Float[Tensor, "t D"]:
        _require_channels(values, self.gate.in_features)
        x = values[packing.local_tokens].to(self.gate.weight.dtype)
        return F.silu(self.gate(x)) * self.value(x)


class PatchEmbedding(InputModule):
    """Linear map of a patch, plus the embeddings of its time (sines, then a small MLP) and class.

    The class ``classes`` is none: the last row of the table.
    """

    def __init__(self, channels: int, dim: int, *, classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.patch = nn.Linear(channels, dim)
        self.time_hidden = nn.Linear(TIME_CHANNELS, dim)
        self.time = nn.Linear(dim, dim)
        self.kind = nn.Embedding(classes + 1, dim)

    def forward(self, values: Float[Tensor, "T C2"], *, packing: Packing) -> Float[Tensor, "t D"]:
        _require_channels(values, self.channels + 2)  # with time and class
        x = values[packing.local_tokens]
        patch, (time, kind) = x[:, : self.channels], x[:, self.channels :].unbind(1)
        dtype = self.patch.weight.dtype
        condition = self.time(F.silu(self.time_hidden(time_features(time).to(dtype))))
        return self.patch(patch.to(dtype)) + condition + self.kind(kind.long())


def time_features(time: Float[Tensor, "T"]) -> Float[Tensor, "T F"]:
    """Return sines and cosines of a time in [0, 1], of periods from short to long."""
    half = TIME_CHANNELS // 2
    steps = torch.arange(half, device=time.device) / half
    angle = 1000.0 * time[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * steps)
    return torch.cat([angle.sin(), angle.cos()], 1)


def with_condition(
    patches: Float[Tensor, "B S C"], *, time: Float[Tensor, "B"], kind: Int[Tensor, "B"]
) -> Float[Tensor, "B S C2"]:
    """Return what ``Patches`` reads: the time and the class of a row behind each of its patches."""
    condition = torch.stack([time.to(patches.dtype), kind.to(patches.dtype)], 1)
    return torch.cat([patches, condition[:, None].expand(*patches.shape[:2], 2)], 2)
