"""Activations that autograd saves for a self-attention, counted from its config.

PyTorch's kernels save queries, keys, values, the output and one number per head and token. Here q,
k and v are those that the kernel is given: the output of the projection, or what norms, clipping,
rotation, sinks and blocks make of it.
"""

from dataclasses import dataclass

from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.positional_encoding import PositionalEncoding
from moesaic.nn.softmax_attention import SINK_CHANNELS, Blocks


@dataclass(frozen=True, slots=True)
class AttentionActivations:
    """Counts the values that a self-attention saves, in a model of ``dim`` channels."""

    config: AttentionConfig
    position: PositionalEncoding
    dim: int
    causal: bool

    def per_token(self) -> int:
        """Return the values per token, in rows that no window limits."""
        (query, keys), config = self.config.widths(self.dim), self.config
        inner = query + config.heads + self._normed
        if self._is_projection_saved:
            inner += query + 2 * keys
        if not config.sinks.learned:
            return inner + self._copies
        # with the channels of the sinks, and the output that they are removed from
        extra = SINK_CHANNELS * (2 * config.heads + 2 * config.num_kv_heads())
        return inner + 2 * query + 2 * keys + extra

    def per_row(self, tokens: int) -> int:
        """Return the values of a row of ``tokens`` tokens beside them: masks, scores, blocks."""
        config, mask = self.config, self.config.window.mask(causal=self.causal)
        limited, (query, keys) = mask.is_limited(tokens), config.widths(self.dim)
        blocks, saved, scores = Blocks.of(mask, length=tokens) if limited else None, 0, tokens**2
        if blocks is not None:
            number, scores = blocks.number(tokens), blocks.num_scores(tokens)
            saved = number * (blocks.size * query + 2 * blocks.keys * keys) - tokens * self._copies
            unread = self._is_projection_saved and not self._is_projection_read
            saved -= tokens * (query + 2 * keys) if unread else 0
        if config.softcap is not None:  # after the cap and after the softmax, and repeated keys
            shared = 2 * (query - keys)
            keys_computed = tokens if blocks is None else blocks.number(tokens) * blocks.keys
            return saved + 2 * config.heads * scores + shared * keys_computed
        if self.position.biases_scores:
            return saved + config.heads * scores
        is_mask_made = limited and (blocks is None or blocks.keys > blocks.size)
        return saved + (scores if is_mask_made else 0)

    @property
    def _normed(self) -> int:
        config, width = self.config, self.config.head_width(self.dim)
        heads = (config.heads, config.num_kv_heads())
        normed = sum(config.qk_norm.saved_activations(width, heads=number) for number in heads)
        if config.clip is None:
            return normed
        # what is clipped is saved: the norms' output, if any
        return normed + (sum(config.widths(self.dim)) if self._norms_before else 0)

    @property
    def _copies(self) -> int:
        """Queries, keys and values that are no views of the projection's output."""
        query, keys = self.config.widths(self.dim)
        clipped = self.config.clip is not None
        is_rotated = self.position.rotated_channels(self.config.head_width(self.dim)) > 0
        changed = is_rotated or clipped or self._normed > 0
        return (query + keys if changed else 0) + (keys if clipped else 0)

    @property
    def _norms_before(self) -> bool:
        """Whether norms read the output of the projection (those with a gain do)."""
        return bool(self.config.qk_norm.parameter_specs(self.config.numbers(self.dim)))

    @property
    def _is_projection_read(self) -> bool:
        """Whether norms or clipping save the output of the projection."""
        return self._norms_before or self.config.clip is not None

    @property
    def _is_projection_saved(self) -> bool:
        """Whether that output is saved; values are a view of it where nothing copies them."""
        return self._is_projection_read or not self.config.sinks.learned
