"""ModelConfig: the shape and the initial distributions of a model, as plain data.

``Transformer(config)`` builds the model.
"""

from pydantic import Field, field_validator, model_validator

from moesaic.core.config import Config
from moesaic.core.errors import did_you_mean
from moesaic.model import (
    pooled_heads as pooled_heads,  # registers its members of Head
)
from moesaic.model import (
    value_heads as value_heads,
)
from moesaic.model.block_layout import BlockLayout, SequentialResidual
from moesaic.model.decoder_mask import CausalMask, DecoderMask
from moesaic.model.head import Head, HeadShape, LanguageModelHead
from moesaic.model.inputs import InputShape, ModelInput, TokenIds
from moesaic.model.mixer_pattern import DEFAULT_MIXER, BlockPattern, parse_pattern
from moesaic.moe import (
    builtin_rules as builtin_rules,
)  # registers every rule that a config may name
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.expert_selection import Hash
from moesaic.nn.attention import Attention
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.gated_linear_attention import GatedLinearAttention as GatedLinearAttention
from moesaic.nn.latent_attention import LatentAttention as LatentAttention
from moesaic.nn.mamba2 import Mamba2 as Mamba2  # registers a member, as the two lines above
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.positional_encoding import PositionalEncoding, Rotary
from moesaic.nn.sequence_mixer import MixerShape, ParallelMixers, SequenceMixer
from moesaic.nn.spike_coding import ActivationCoding, RealValues

MAX_LAYERS = 4096  # of a stack: each is a module, and is counted by itself


class Stack(Config):
    """``layers`` blocks; block i (from 0) has experts where ``(i + 1) % moe_every == 0``.

    ``moe_every=0`` makes the whole stack dense, ``first_dense_layers`` its first blocks.
    ``sparse_layers`` lists the blocks with experts instead, whichever they are, from 0.
    ``experts_per_layer`` gives each MoE layer its own number of experts, first layer first (a
    pyramid, DeepSpeed-MoE, 2201.05596, section 4.1). ``moe`` replaces the model's ``moe`` here.
    ``pattern`` names the sequence mixers of the blocks and is repeated over them
    (``model/mixer_pattern.py``); a block without a feed-forward has no experts either.
    """

    layers: int = Field(ge=0, le=MAX_LAYERS)
    moe_every: int = Field(default=2, ge=0)
    first_dense_layers: int = Field(default=0, ge=0)
    sparse_layers: tuple[int, ...] | None = None
    experts_per_layer: tuple[int, ...] = ()
    moe: SparseLayer | None = None
    pattern: str = DEFAULT_MIXER

    def block_pattern(self, layer: int) -> BlockPattern:
        """Return which mixers block ``layer`` has."""
        blocks = parse_pattern(self.pattern)
        return blocks[layer % len(blocks)]

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether block ``layer`` has an MoE layer, if the model has any."""
        if not self.block_pattern(layer).feed_forward:
            return False
        if self.sparse_layers is not None:
            return layer in self.sparse_layers
        every = self.moe_every
        return layer >= self.first_dense_layers and every > 0 and (layer + 1) % every == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The blocks with an MoE layer, if the model has any."""
        return tuple(layer for layer in range(self.layers) if self.is_moe_layer(layer))

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, text: str) -> str:
        parse_pattern(text)
        return text

    @model_validator(mode="after")
    def _check(self) -> "Stack":
        listed = self.sparse_layers or ()
        if listed and (self.first_dense_layers or listed != self.moe_layers):
            raise ValueError(
                f"sparse_layers={list(listed)} to be some of the {self.layers} blocks in order, "
                "each with a feed-forward, and first_dense_layers=0"
            )
        if self.experts_per_layer and len(self.experts_per_layer) != len(self.moe_layers):
            raise ValueError(
                f"experts_per_layer with one number for each of the {len(self.moe_layers)} MoE "
                f"layers, not {len(self.experts_per_layer)}"
            )
        return self


class InitConfig(Config):
    """Standard deviations of the normal distributions that weights are initialized with.

    =====================================  ====================================================
    kind                                   initial values
    =====================================  ====================================================
    embedding, output table, learned       ``embedding_std`` (default ``dim ** -0.5``; a scaled
    positions                              embedding then has unit variance)
    matrix, expert (maps into a branch)    ``std`` (default ``fan_in ** -0.5``)
    matrix, expert (maps back to the       the same times ``(branches of the stack) ** -0.5``:
    residual stream)                       2 per encoder or decoder-only layer, 3 with cross-
                                           attention; unless ``scale_by_depth`` is false
    router (maps to logits)                ``router_std`` (default ``(0.1 / fan_in) ** 0.5``:
                                           Switch, 2101.03961, section 2.4)
    norm                                   gain 1, bias 0
    bias                                   0
    =====================================  ====================================================
    """

    std: float | None = Field(default=None, gt=0)
    embedding_std: float | None = Field(default=None, gt=0)
    router_std: float | None = Field(default=None, gt=0)
    scale_by_depth: bool = True


class ModelConfig(Config):
    """An encoder-decoder if ``encoder.layers > 0``, else a decoder-only model. Pre-norm.

    ``mixers`` are the sequence mixers that the patterns of the stacks name. The name ``attention``
    is ``Attention()``, self-attention with the heads of ``attention``, unless ``mixers`` has
    another; cross-attention has those heads too. ``input`` is what both stacks read (``vocab_size``
    and ``embedding`` are of ids), ``head`` what is predicted from the decoder's states.
    """

    vocab_size: int = Field(default=8, ge=8)
    dim: int = Field(ge=1)
    input: ModelInput = TokenIds()
    head: Head = LanguageModelHead()
    encoder: Stack
    decoder: Stack
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    moe: SparseLayer = NoMoE()
    norm: Norm = RMSNorm()
    position: PositionalEncoding = Rotary()
    embedding: EmbeddingConfig = EmbeddingConfig()
    decoder_mask: DecoderMask = CausalMask()
    mixers: dict[str, SequenceMixer] = Field(default_factory=dict)
    block_layout: BlockLayout = SequentialResidual()
    activation_coding: ActivationCoding = RealValues()
    bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init: InitConfig = InitConfig()

    @property
    def head_dim(self) -> int:
        return self.attention.head_width(self.dim)

    def is_causal(self, side: str) -> bool:
        """Whether a token of a stack reads itself and those before it only."""
        return side == "decoder" and self.decoder_mask.causal

    @property
    def shares_table(self) -> bool:
        """Whether the head scores the table of the input (a tied embedding)."""
        return self.head.reads_table and self.embedding.tied

    @property
    def has_output_table(self) -> bool:
        """Whether the head scores a table of its own."""
        return self.head.reads_table and not self.embedding.tied

    @property
    def input_shape(self) -> InputShape:
        """What the input may read of the model."""
        tables = self.embedding.replace(tied=not self.has_output_table)
        return InputShape(self.dim, self.vocab_size, tables)

    @property
    def head_shape(self) -> HeadShape:
        """What the head may read of the model."""
        return HeadShape(self.dim, self.vocab_size)

    def stack_of(self, side: str) -> Stack:
        """Return the ``encoder`` or the ``decoder``."""
        return self.encoder if side == "encoder" else self.decoder

    def mixer_shape(self, side: str) -> MixerShape:
        """Return what the mixers of a stack may read of the model."""
        return MixerShape(
            self.dim,
            causal=self.is_causal(side),
            attention=self.attention,
            bias=self.bias,
            position=self.position,
            norm=self.norm,
        )

    def is_dense_layer(self, stack: Stack, *, layer: int) -> bool:
        """Return whether a block has a dense feed-forward."""
        moe = self.moe_of_layer(stack, layer=layer)
        return isinstance(moe, NoMoE) and stack.block_pattern(layer).feed_forward

    def mixers_of_stack(self, stack: Stack) -> list[SequenceMixer]:
        """Return the mixers of all residual branches of a stack, in order."""
        layers = range(stack.layers)
        return [mixer for i in layers for mixer in self.mixers_of_layer(stack, layer=i)]

    def mixers_of_layer(self, stack: Stack, *, layer: int) -> tuple[SequenceMixer, ...]:
        """Return the mixer of each residual branch of a block, in order."""
        return tuple(
            self._mixer(branch[0])
            if len(branch) == 1
            else ParallelMixers(mixers=tuple(map(self._mixer, branch)))
            for branch in stack.block_pattern(layer).branches
        )

    def _mixer(self, name: str) -> SequenceMixer:
        known = {DEFAULT_MIXER: Attention()} | self.mixers
        if name not in known:
            raise ValueError(
                f"found the mixer {name!r} in a pattern, expected one of {', '.join(known)} "
                f"(the keys of mixers){did_you_mean(name, list(known))}"
            )
        return known[name]

    def moe_of_stack(self, stack: Stack) -> SparseLayer:
        """Return the config of a stack's MoE layers."""
        return self.moe if stack.moe is None else stack.moe

    def moe_of_layer(self, stack: Stack, *, layer: int) -> SparseLayer:
        """Return the config of a block's MoE layer; ``NoMoE`` where the block is dense."""
        if not stack.is_moe_layer(layer):
            return NoMoE()
        moe = self.moe_of_stack(stack)
        if not isinstance(moe, MoE) or not stack.experts_per_layer:
            return moe
        return moe.replace(experts=stack.experts_per_layer[stack.moe_layers.index(layer)])

    def routed_moe_of_layer(self, stack: Stack, *, layer: int) -> MoE | None:
        """Return the config of a block's routed MoE layer, or None where there is none."""
        sparse = self.moe_of_layer(stack, layer=layer)
        return sparse if isinstance(sparse, MoE) else None

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        heads = self.attention
        if self.decoder.layers < 1:
            raise ValueError("decoder.layers of at least 1")
        if problems := heads.problems(self.dim, position=self.position):
            raise ValueError(problems)
        for side in ("encoder", "decoder"):
            stack = self.stack_of(side)
            _check_mixers(self, side=side)
            moe = self.moe_of_stack(stack)
            if not isinstance(moe, MoE | NoMoE) and stack.experts_per_layer:
                name = type(moe).__name__
                raise ValueError(f"no experts_per_layer with {name}")
            if isinstance(moe, MoE):
                _check_cross_layer(moe, experts=stack.experts_per_layer)
                if stack.moe_layers:
                    _check_reads_ids(moe, source=self.input)
            for layer in stack.moe_layers:
                _check_select(self.routed_moe_of_layer(stack, layer=layer))
        moe = self.moe_of_stack(self.decoder)
        if problems := self.head.problems(self.input):
            raise ValueError(f"{type(self.head).__name__} expects {problems}")
        if self.decoder.moe_layers and self.is_causal("decoder") and not moe.causal:
            raise ValueError(
                f"found {_rule_name(moe)} in the decoder, expected a causal rule: decoding does "
                f"not have later tokens yet. Set it as encoder.moe, and another rule as moe (or "
                f"decoder.moe)"
            )
        return self


def _check_mixers(config: ModelConfig, *, side: str) -> None:
    stack = config.stack_of(side)
    for layer in range(min(stack.layers, len(parse_pattern(stack.pattern)))):
        for mixer in config.mixers_of_layer(stack, layer=layer):
            if problems := mixer.problems(config.mixer_shape(side)):
                raise ValueError(f"{type(mixer).__name__} of {side}.pattern expects {problems}")


def _check_select(moe: MoE | None) -> None:
    problems = moe and moe.select.problems(moe.num_router_outputs, moe.null_experts.count())
    if moe and problems:
        raise ValueError(f"found moe.experts={moe.experts}, {_rule_name(moe)} expects {problems}")


def _check_cross_layer(moe: MoE, *, experts: tuple[int, ...]) -> None:
    problems = moe.cross_layer.problems(experts, moe.router_input)
    if problems:
        raise ValueError(f"{type(moe.cross_layer).__name__} expects {problems}")


def _check_reads_ids(moe: MoE, *, source: ModelInput) -> None:
    """Raise ValueError if routers read token ids, and the model has none."""
    if isinstance(source, TokenIds):
        return
    reading = [moe.select] if isinstance(moe.select, Hash) else []
    if moe.router_input.embedding_source != "nothing":
        reading = [moe.router_input]
    for rule in reading:
        name, found = type(rule).__name__, type(source).__name__
        raise ValueError(f"input=TokenIds, whose ids {name} reads, not {found}")


def _rule_name(moe: SparseLayer) -> str:
    return type(moe.select if isinstance(moe, MoE) else moe).__name__
