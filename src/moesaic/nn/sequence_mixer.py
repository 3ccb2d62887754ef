"""Sequence mixers: what mixes the tokens of a row in a transformer block (attention, recurrences).

``SequenceMixer`` is the family that a config chooses from, ``SequenceMixerModule`` the base of the
modules. Norm, dropout and residual connection are those of the block around it
(``model/block.py``). A module maps packed tokens [T, D] to [T, D] in training and in decoding
through one ``forward``; in decoding it also reads and updates a state.

Letters: T tokens, B rows, n newest tokens, D model dim, H heads, d head dim.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import ClassVar, Self, cast

import torch
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Float, Int, Tensor
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.attention_scores import ScoreBias
from moesaic.nn.decode_slots import DecodeSlots
from moesaic.nn.decode_state import DecodeState, JointState
from moesaic.nn.initializer import CustomInitializers, Initializer
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.nn.positional_encoding import NoPositionalEncoding, PositionalEncoding, Rotation
from moesaic.nn.shardable_module import (
    ContextScope,
    ContextSharding,
    ShardableModule,
    TensorSharding,
)
from moesaic.nn.tensor_parallel_group import TensorParallelGroup


@dataclass(frozen=True, slots=True)
class MixerShape:
    """What a mixer may read of the model that it is built for.

    ``causal``: the stack is a decoder. ``attention`` and ``position`` are the model's, for a mixer
    that has none of its own; ``norm`` is for norms inside of a mixer.
    """

    dim: int
    causal: bool
    attention: AttentionConfig
    bias: bool = False
    position: PositionalEncoding = field(default_factory=NoPositionalEncoding)
    norm: Norm = field(default_factory=RMSNorm)


@dataclass(frozen=True, slots=True)
class MixerContext:
    """What every mixer of a stack needs of one batch beside the hidden states.

    ``position`` are the places in their rows of ``packing.gathered_tokens``. In decoding the
    packing has the newest tokens only, and ``slots`` says where all tokens so far are cached; it
    is None where rows are whole. ``score_bias`` is the stack's bias of attention scores, if its
    positions have one.
    """

    packing: Packing
    position: Int[Tensor, "T"]
    causal: bool
    slots: DecodeSlots | None = None
    score_bias: ScoreBias | None = None
    _rotations: dict[Hashable, Rotation] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of_rows(packing: Packing, *, causal: bool) -> "MixerContext":
        """Return the context of whole rows."""
        return MixerContext(packing, packing.position[packing.gathered_tokens], causal)

    @property
    def decode_slots(self) -> DecodeSlots:
        """The slots of all tokens so far; in decoding only."""
        assert self.slots is not None, "whole rows are not decoded"
        return self.slots

    def rotation(self, encoding: PositionalEncoding, *, head_dim: int) -> Rotation:
        """Return the rotation of queries and keys [T, H, d], made once per encoding and width."""
        key = (encoding, head_dim)
        if key not in self._rotations:
            length = self._lengths() if encoding.reads_length else None
            self._rotations[key] = encoding.rotation(
                self.position, head_dim=head_dim, length=length
            )
        return self._rotations[key]

    def _lengths(self) -> Int[Tensor, "T"]:
        """Return the length so far of the row of each token of ``position``."""
        packing, length = self.packing, self.packing.lengths
        if self.slots is not None:
            length = length + self.slots.newest_positions[:, 0]
        return length[packing.row[packing.gathered_tokens]]


class SequenceMixerModule(ShardableModule):
    """Base of the modules. The projection back to the residual stream is called ``out``.

    Initial values beside those of ``InitConfig`` are declared as a ``CustomInitializers``, matrices
    that hold several maps as ``FusedProjections`` (both bases in ``nn/``). How tensor and context
    ranks share the module is declared as in ``ShardableModule``; by default they do not.
    """

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        """Mix the tokens of each row; with ``state``, after the tokens that it has, and update it.

        ``x`` are the tokens of this rank (``packing.local_tokens``), in training and in decoding.
        Where ``context.causal``, a token reads itself and those before it. Rows may have different
        numbers of newest tokens, also none: padding changes neither output nor state.
        """
        raise NotImplementedError

    def init_state(self, rows: int, *, like: Tensor) -> DecodeState:
        """Return the state of ``rows`` rows without tokens, on the device of ``like``."""
        raise NotImplementedError


class SequenceMixer(Choice):
    """Family: what mixes tokens in a block; ``ModelConfig.mixers`` and ``Stack.pattern`` choose.

    ``branch`` names the module in parameter names (``decoder.0.BRANCH.inner.out.weight``).
    """

    branch: ClassVar[str] = "mixer"

    def build(self, shape: MixerShape, /) -> SequenceMixerModule:
        """Return the module."""
        raise NotImplementedError

    def problems(self, _shape: MixerShape, /) -> str | None:
        """Return what the mixer expects where it does not fit the model, or None.

        A mixer that reads earlier tokens only expects ``shape.causal``.
        """
        return None

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        """Return the parameters of the module, to count a model without building it."""
        raise NotImplementedError

    def mixing_flops(self, _shape: MixerShape, /, *, tokens: int) -> float:
        """Return the FLOPs of a forward pass over a row, beside products with parameters."""
        del tokens
        return 0.0

    def shrink(self, _shape: MixerShape, /) -> Self:
        """Return the same mixer with small sizes that fit ``shape``, for fast comparisons."""
        return self


START_GAIN = 0.3


class ParallelMixers(SequenceMixer):
    """Several mixers on one input, the norms of their outputs summed (SpikingBrain, 2509.05276).

    ``a | b`` in a pattern.
    """

    mixers: tuple[SequenceMixer, ...]

    branch = "parallel_mixers"

    def build(self, shape: MixerShape, /) -> SequenceMixerModule:
        return ParallelMixersModule([mixer.build(shape) for mixer in self.mixers], shape=shape)

    def problems(self, shape: MixerShape, /) -> str | None:
        if len(self.mixers) < 2:
            return "two or more mixers"
        return next(filter(None, (mixer.problems(shape) for mixer in self.mixers)), None)

    def parameter_specs(self, shape: MixerShape, /) -> Sequence[ParameterSpec]:
        inner = [spec for mixer in self.mixers for spec in mixer.parameter_specs(shape)]
        return [*inner, *(len(self.mixers) * list(shape.norm.parameter_specs(shape.dim)))]

    def mixing_flops(self, shape: MixerShape, /, *, tokens: int) -> float:
        return sum(mixer.mixing_flops(shape, tokens=tokens) for mixer in self.mixers)

    def shrink(self, shape: MixerShape, /) -> Self:
        return self.replace(mixers=tuple(mixer.shrink(shape) for mixer in self.mixers))


class ParallelMixersModule(SequenceMixerModule, CustomInitializers):
    """The module of ``ParallelMixers``: ``sum_i norm_i(mixer_i(x))``.

    The gains start small: outputs of unit size would hide the embeddings of a new model, and what
    ``scale_by_depth`` does to the last matrix of a branch ends at the norm.
    """

    def __init__(self, mixers: Sequence[SequenceMixerModule], *, shape: MixerShape) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(shape.norm.build(shape.dim) for _ in mixers)

    def initializers(self) -> Mapping[str, Initializer]:
        gain = Initializer(kind="norm", quantile=partial(torch.full_like, fill_value=START_GAIN))
        return {f"norms.{index}.weight": gain for index in range(len(self.norms))}

    def forward(
        self, x: Float[Tensor, "T D"], *, context: MixerContext, state: DecodeState | None = None
    ) -> Float[Tensor, "T D"]:
        states = state.states if isinstance(state, JointState) else [None] * len(self.mixers)
        outputs = [
            norm(mixer(x, context=context, state=one))
            for mixer, norm, one in zip(self.mixers, self.norms, states, strict=True)
        ]
        return reduce(torch.add, outputs)

    def init_state(self, rows: int, *, like: Tensor) -> DecodeState:
        mixers = cast("Iterable[SequenceMixerModule]", self.mixers)
        return JointState([mixer.init_state(rows, like=like) for mixer in mixers])

    def tensor_sharding(self) -> TensorSharding:
        """Return nothing sharded: each mixer inside declares its own."""
        return TensorSharding()

    def use_tensor_parallel(self, group: TensorParallelGroup, *, ranks: int) -> None:
        """Do nothing: each mixer inside is adapted by itself, norms are per token."""

    def context_sharding(self) -> ContextSharding:
        """Return no bound: each mixer inside declares its own."""
        return ContextSharding()

    def use_context_parallel(self, scope: ContextScope) -> None:
        """Do nothing: each mixer inside is adapted by itself."""
