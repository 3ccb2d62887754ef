"""Presets of moesaic's own: encoder-decoders for one machine.

Deep encoder, shallow decoder: the encoder reads all tokens at once and the decoder generates one at
a time, so this is faster at equal quality (Kasai et al. 2021, 2006.10369).
"""

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets.preset import PRESETS, Preset
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import SwitchTop1, TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU, SwiGLU
from moesaic.nn.norm import LayerNorm

OURS = "moesaic's own"


@PRESETS.register()
def tiny() -> Preset:
    """For tests and tutorials: trains in seconds on one core."""
    return Preset(_sparse(dim=64, heads=2, layers=(2, 1), experts=4, vocab_size=2000), OURS)


@PRESETS.register()
def small() -> Preset:
    """For minutes on two cores: 8 experts, one per token, in every second layer."""
    return Preset(_sparse(dim=192, heads=4, layers=(6, 2), experts=8, vocab_size=8000), OURS)


@PRESETS.register()
def base() -> Preset:
    """For one GPU: the size of transformer-base (1706.03762), 16 experts, two per token."""
    config = _sparse(dim=512, heads=8, layers=(12, 4), experts=16, vocab_size=32000)
    moe = MoE(experts=16, select=TopK(k=2))
    feed = FeedForwardConfig(hidden=1408, activation=SwiGLU())
    return Preset(config.replace(moe=moe, feed_forward=feed, dropout=0.1), OURS)


def _sparse(
    *, dim: int, heads: int, layers: tuple[int, int], experts: int, vocab_size: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        encoder=Stack(layers=layers[0], moe_every=2),
        decoder=Stack(layers=layers[1], moe_every=2 if layers[1] > 1 else 1),
        attention=AttentionConfig(heads=heads),
        feed_forward=FeedForwardConfig(hidden=2 * dim, activation=ReLU()),
        moe=MoE(experts=experts, select=SwitchTop1()),
        norm=LayerNorm(),
    )
