"""Attention config: the numbers of heads and their width."""

from pydantic import Field

from moesaic.core.config import Config
from moesaic.nn.positional_encoding import PositionalEncoding


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

    def widths(self, dim: int) -> tuple[int, int]:
        """Channels of all queries, and of all keys (values have as many)."""
        width = self.head_width(dim)
        return self.heads * width, self.num_kv_heads() * width

    def problems(self, dim: int, *, position: PositionalEncoding) -> str | None:
        """Return what these numbers of heads expect in a model of ``dim`` channels, or None."""
        if self.head_dim is None and dim % self.heads:
            return f"attention.heads={self.heads} to divide dim={dim}"
        if self.heads % self.num_kv_heads():
            return f"attention.kv_heads={self.num_kv_heads()} to divide heads={self.heads}"
        if position.rotated_channels(self.head_width(dim)) % 2:
            name = type(position).__name__
            return f"an even head_dim for {name}, not {self.head_width(dim)}"
        return None
