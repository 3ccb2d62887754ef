"""Attention config: the numbers of heads and their width."""

from pydantic import Field

from moesaic.core.config import Config


class AttentionConfig(Config):
    """``kv_heads`` < ``heads`` shares keys and values between heads (grouped, 2305.13245).

    ``head_dim`` defaults to ``dim / heads``.
    """

    heads: int = Field(ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=1)

    def num_kv_heads(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads

    def head_width(self, dim: int) -> int:
        """Channels per head."""
        return self.head_dim or dim // self.heads
