"""Blueprint: everything that decides a model's shape and its start, as plain data.

``config.py`` adds the one verb, ``build``.
"""

from pydantic import Field, model_validator

from moesaic.core.config import Config
from moesaic.moe.config import MoE, NoMoE, Sparse
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForward
from moesaic.nn.norm import Norm, RMSNorm
from moesaic.nn.position import Position, Rotary


class Stack(Config):
    """``layers`` blocks; block i (from 0) has experts where ``(i + 1) % moe_every == 0``.

    ``moe_every=0`` keeps the whole stack dense. ``experts`` gives each of those blocks a number of
    experts of its own, first block first (a pyramid, DeepSpeed-MoE, 2201.05596, section 4.1).
    """

    layers: int = Field(ge=0)
    moe_every: int = Field(default=2, ge=0)
    experts: tuple[int, ...] = ()

    def sparse(self, layer: int) -> bool:
        """Whether block ``layer`` may have experts."""
        return self.moe_every > 0 and (layer + 1) % self.moe_every == 0

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
    router                                 ``router_std`` (default ``(0.1 / dim) ** 0.5``: Switch,
                                           2101.03961, section 2.4)
    norm                                   gain 1, bias 0
    bias                                   0
    =====================================  ====================================================
    """

    std: float | None = Field(default=None, gt=0)
    embedding_std: float | None = Field(default=None, gt=0)
    router_std: float | None = Field(default=None, gt=0)
    scale_by_depth: bool = True


class Blueprint(Config):
    """An encoder-decoder if ``encoder.layers > 0``, else a decoder-only model. Pre-norm."""

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
    bias: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    init: Init = Init()

    @property
    def head_dim(self) -> int:
        return self.attention.width(self.dim)

    def experts(self, stack: Stack, *, layer: int) -> MoE | None:
        """The mixture in a block, or None where it is dense."""
        if not isinstance(self.moe, MoE) or not stack.sparse(layer):
            return None
        if not stack.experts:
            return self.moe
        return self.moe.replace(experts=stack.experts[stack.sparse_layers.index(layer)])

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
        if isinstance(self.moe, MoE):
            k = self.moe.select.experts_per_token(2**30)
            fewest = min((self.moe.experts, *self.encoder.experts, *self.decoder.experts))
            if k > fewest + self.moe.spare.count():
                raise ValueError(f"moe.experts={fewest} to be at least {k:g} (the select)")
        return self
