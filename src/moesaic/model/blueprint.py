"""Blueprint: everything that decides a model's shape and its start, as plain data.

``config.py`` adds the one verb, ``build``.
"""

from pydantic import Field, model_validator

from moesaic.core.config import Config
from moesaic.model.arrangement import Arrangement, Serial
from moesaic.moe import members as members  # every rule is a word of a blueprint
from moesaic.moe.attention import AttentionExperts, NoAttentionExperts
from moesaic.moe.config import MoE, NoMoE, Sparse
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForward
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.position import Position, Rotary


class Stack(Config):
    """``layers`` blocks; block i (from 0) has experts where ``(i + 1) % moe_every == 0``.

    ``moe_every=0`` keeps the whole stack dense, ``dense`` its first so many blocks. ``experts``
    gives each of those that are not a number of experts of its own, first block first (a pyramid,
    DeepSpeed-MoE, 2201.05596, section 4.1).
    ``moe`` is what stands in them, if not what the rest of the model has.
    """

    layers: int = Field(ge=0)
    moe_every: int = Field(default=2, ge=0)
    dense: int = Field(default=0, ge=0)
    experts: tuple[int, ...] = ()
    moe: Sparse | None = None

    def sparse(self, layer: int) -> bool:
        """Whether block ``layer`` may have experts."""
        return layer >= self.dense and self.moe_every > 0 and (layer + 1) % self.moe_every == 0

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The blocks that may have experts."""
        return tuple(layer for layer in range(self.layers) if self.sparse(layer))

    @model_validator(mode="after")
    def _check(self) -> "Stack":
        if self.experts and len(self.experts) != len(self.sparse_layers):
            raise ValueError(
                f"experts with one number for each of the {len(self.sparse_layers)} blocks that "
                f"have any, not {len(self.experts)}"
            )
        return self


class Init(Config):
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


class Blueprint(Config):
    """An encoder-decoder if ``encoder.layers > 0``, else a decoder-only model. Pre-norm.

    ``attention_experts`` are those of every self-attention; cross-attention has none.
    """

    vocab_size: int = Field(ge=8)
    dim: int = Field(ge=1)
    encoder: Stack
    decoder: Stack
    attention: AttentionConfig
    feed_forward: FeedForward
    moe: Sparse = NoMoE()
    norm: Norm = RMSNorm()
    position: Position = Rotary()
    embedding: EmbeddingConfig = EmbeddingConfig()
    attention_experts: AttentionExperts = NoAttentionExperts()
    block: Arrangement = Serial()
    bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init: Init = Init()

    @property
    def head_dim(self) -> int:
        return self.attention.width(self.dim)

    @property
    def self_attention(self) -> AttentionConfig:
        """All heads of a block's self-attention, whichever expert they belong to."""
        return self.attention_experts.all_heads(self.attention, dim=self.dim)

    def mixture(self, stack: Stack) -> Sparse:
        """What stands in the sparse blocks of a stack."""
        return self.moe if stack.moe is None else stack.moe

    def sparse(self, stack: Stack, *, layer: int) -> Sparse:
        """What stands in the place of a block's feed-forward; ``NoMoE`` where it is dense."""
        if not stack.sparse(layer):
            return NoMoE()
        moe = self.mixture(stack)
        if not isinstance(moe, MoE) or not stack.experts:
            return moe
        return moe.replace(experts=stack.experts[stack.sparse_layers.index(layer)])

    def experts(self, stack: Stack, *, layer: int) -> MoE | None:
        """The mixture in a block, or None where there is none."""
        sparse = self.sparse(stack, layer=layer)
        return sparse if isinstance(sparse, MoE) else None

    @model_validator(mode="after")
    def _check(self) -> "Blueprint":
        heads = self.attention
        if self.decoder.layers < 1:
            raise ValueError("decoder.layers of at least 1")
        if heads.head_dim is None and self.dim % heads.heads:
            raise ValueError(f"attention.heads={heads.heads} to divide dim={self.dim}")
        if heads.heads % heads.groups():
            raise ValueError(f"attention.kv_heads={heads.groups()} to divide heads={heads.heads}")
        if isinstance(self.position, Rotary) and self.head_dim % 2:
            raise ValueError(f"an even head_dim for Rotary, not {self.head_dim}")
        for stack in (self.encoder, self.decoder):
            body = self.mixture(stack)
            if not isinstance(body, MoE | NoMoE) and stack.experts:
                name = type(body).__name__
                raise ValueError(f"no number of experts per block (stack.experts) with {name}")
            if isinstance(body, MoE):
                _check_link(body, experts=stack.experts)
            for layer in stack.sparse_layers:
                _check_experts(self.experts(stack, layer=layer))
        wanted = self.mixture(self.decoder)
        if self.decoder.sparse_layers and not wanted.causal:
            raise ValueError(
                f"found {_rule(wanted)} in the decoder, expected a rule that does not look at "
                f"later tokens: they are not there yet when it writes. Put it into encoder.moe, "
                f"and another rule into moe (or decoder.moe)"
            )
        return self


def _check_experts(moe: MoE | None) -> None:
    refused = moe and moe.select.refuses(experts=moe.routed, spare=moe.spare.count())
    if moe and refused:
        raise ValueError(f"found moe.experts={moe.experts}, {_rule(moe)} expects {refused}")


def _check_link(moe: MoE, *, experts: tuple[int, ...]) -> None:
    refused = moe.link.refuses(experts=experts, condition=moe.condition)
    if refused:
        raise ValueError(f"{type(moe.link).__name__} expects {refused}")


def _rule(moe: Sparse) -> str:
    return type(moe.select if isinstance(moe, MoE) else moe).__name__
