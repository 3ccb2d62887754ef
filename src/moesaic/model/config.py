"""Blueprint: everything that decides a model's shape and its start, as plain data.

``config.py`` adds the one verb, ``build``.
"""

from pydantic import Field, model_validator

from moesaic.core.config import Config
from moesaic.model.block_layout import BlockLayout, SequentialResidual
from moesaic.moe import builtin_rules as builtin_rules  # every rule is a word of a blueprint
from moesaic.moe.attention_experts import AttentionExperts, NoAttentionExperts
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.positional_encoding import PositionalEncoding, Rotary


class Stack(Config):
    """``layers`` blocks; block i (from 0) has experts where ``(i + 1) % moe_every == 0``.

    ``moe_every=0`` keeps the whole stack dense, ``dense`` its first so many blocks. ``experts``
    gives each of those that are not a number of experts of its own, first block first (a pyramid,
    DeepSpeed-MoE, 2201.05596, section 4.1).
    ``moe`` is what stands in them, if not what the rest of the model has.
    """

    layers: int = Field(ge=0)
    moe_every: int = Field(default=2, ge=0)
    first_dense_layers: int = Field(default=0, ge=0)
    experts_per_layer: tuple[int, ...] = ()
    moe: SparseLayer | None = None

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block ``layer`` may have experts."""
        return (
            layer >= self.first_dense_layers
            and self.moe_every > 0
            and (layer + 1) % self.moe_every == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The blocks that may have experts."""
        return tuple(layer for layer in range(self.layers) if self.is_moe_layer(layer))

    @model_validator(mode="after")
    def _check(self) -> "Stack":
        if self.experts_per_layer and len(self.experts_per_layer) != len(self.moe_layers):
            raise ValueError(
                f"experts with one number for each of the {len(self.moe_layers)} blocks that "
                f"have any, not {len(self.experts_per_layer)}"
            )
        return self


class InitConfig(Config):
    """Standard deviations of the normal distributions that weights start from.

    =====================================  ====================================================
    kind                                   start
    =====================================  ====================================================
    embedding, output table, learned       ``embedding_std`` (default ``dim ** -0.5``; a scaled
    positions                              embedding then has unit variance)
    matrix, expert (products into a block) ``std`` (default ``fan_in ** -0.5``)
    matrix, expert (products back to the   the same times ``(branches of the stack) ** -0.5``:
    residual stream)                       2 per encoder or decoder-only layer, 3 with cross-
                                           attention; unless ``scale_by_depth`` is false
    router (products that make logits)     ``router_std`` (default ``(0.1 / fan_in) ** 0.5``:
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

    ``attention_experts`` are those of every self-attention; cross-attention has none.
    """

    vocab_size: int = Field(ge=8)
    dim: int = Field(ge=1)
    encoder: Stack
    decoder: Stack
    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    moe: SparseLayer = NoMoE()
    norm: Norm = RMSNorm()
    position: PositionalEncoding = Rotary()
    embedding: EmbeddingConfig = EmbeddingConfig()
    attention_experts: AttentionExperts = NoAttentionExperts()
    block_layout: BlockLayout = SequentialResidual()
    bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init: InitConfig = InitConfig()

    @property
    def head_dim(self) -> int:
        return self.attention.head_width(self.dim)

    @property
    def self_attention(self) -> AttentionConfig:
        """All heads of a block's self-attention, whichever expert they belong to."""
        return self.attention_experts.combined_attention(self.attention, self.dim)

    def moe_of_stack(self, stack: Stack) -> SparseLayer:
        """What stands in the sparse blocks of a stack."""
        return self.moe if stack.moe is None else stack.moe

    def moe_of_layer(self, stack: Stack, *, layer: int) -> SparseLayer:
        """What stands in the place of a block's feed-forward; ``NoMoE`` where it is dense."""
        if not stack.is_moe_layer(layer):
            return NoMoE()
        moe = self.moe_of_stack(stack)
        if not isinstance(moe, MoE) or not stack.experts_per_layer:
            return moe
        return moe.replace(experts=stack.experts_per_layer[stack.moe_layers.index(layer)])

    def routed_moe_of_layer(self, stack: Stack, *, layer: int) -> MoE | None:
        """The mixture in a block, or None where there is none."""
        sparse = self.moe_of_layer(stack, layer=layer)
        return sparse if isinstance(sparse, MoE) else None

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        heads = self.attention
        if self.decoder.layers < 1:
            raise ValueError("decoder.layers of at least 1")
        if heads.head_dim is None and self.dim % heads.heads:
            raise ValueError(f"attention.heads={heads.heads} to divide dim={self.dim}")
        if heads.heads % heads.num_kv_heads():
            raise ValueError(
                f"attention.kv_heads={heads.num_kv_heads()} to divide heads={heads.heads}"
            )
        if isinstance(self.position, Rotary) and self.head_dim % 2:
            raise ValueError(f"an even head_dim for Rotary, not {self.head_dim}")
        for stack in (self.encoder, self.decoder):
            body = self.moe_of_stack(stack)
            if not isinstance(body, MoE | NoMoE) and stack.experts_per_layer:
                name = type(body).__name__
                raise ValueError(f"no number of experts per block (stack.experts) with {name}")
            if isinstance(body, MoE):
                _check_link(body, experts=stack.experts_per_layer)
            for layer in stack.moe_layers:
                _check_select(self.routed_moe_of_layer(stack, layer=layer))
        wanted = self.moe_of_stack(self.decoder)
        if self.decoder.moe_layers and not wanted.causal:
            raise ValueError(
                f"found {_rule_name(wanted)} in the decoder, expected a rule that does not look at "
                f"later tokens: they are not there yet when it writes. Put it into encoder.moe, "
                f"and another rule into moe (or decoder.moe)"
            )
        return self


def _check_select(moe: MoE | None) -> None:
    refused = moe and moe.select.problems(moe.num_router_outputs, moe.null_experts.count())
    if moe and refused:
        raise ValueError(f"found moe.experts={moe.experts}, {_rule_name(moe)} expects {refused}")


def _check_link(moe: MoE, *, experts: tuple[int, ...]) -> None:
    refused = moe.cross_layer.problems(experts, moe.router_input)
    if refused:
        raise ValueError(f"{type(moe.cross_layer).__name__} expects {refused}")


def _rule_name(moe: SparseLayer) -> str:
    return type(moe.select if isinstance(moe, MoE) else moe).__name__
