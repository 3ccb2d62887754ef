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

    def exchanged_values(
        self, dim: int, *, queries: int, keys: int, ranks: int, tensor: int = 1
    ) -> float:
        """Return the values that a context rank sends in a forward pass of Ulysses (2309.14509).

        ``ranks`` context ranks have so many tokens each on every one of ``tensor`` tensor ranks:
        an all-to-all of tokens for heads, and back. Backward sends as many.
        """
        heads, kv_heads = self.heads // tensor, self.num_kv_heads() // tensor
        # where a key/value head is read on several ranks it is sent to each
        sent = sum(-(-(r + 1) * kv_heads // ranks) - r * kv_heads // ranks for r in range(ranks))
        rows = 2 * (heads * queries + sent * keys) * (ranks - 1) / ranks
        return tensor * rows * self.head_width(dim)

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
