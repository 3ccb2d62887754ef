"""DeepSpeed-MoE: decoders of 24 layers with experts in every second one (2201.05596).

From the paper and its scripts: width 1024, 16 heads, one expert per token; 128 experts in each of
12 layers ("350M+MoE-128", 13B), or a pyramid of ten layers of 32 and two of 64 with a fixed
feed-forward beside them ("PR-MoE", 4B). The vocabulary, learned positions, GELU and biases are the
usual ones of such decoders and our guesses; with them the counts agree.
"""

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets.preset import Preset, Published
from moesaic.moe.config import MoE
from moesaic.moe.limit import Capacity, RandomPriority
from moesaic.moe.select import SwitchTop1
from moesaic.moe.shared_experts import ResidualExpert
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import GELU, FeedForwardConfig
from moesaic.nn.norm import LayerNorm
from moesaic.nn.positional_encoding import LearnedPositions

SOURCE = "Rajbhandari et al. 2022, arXiv:2201.05596"
GUESSED = ("vocab_size", "feed_forward", "norm", "position", "embedding", "bias", "moe.balance")
MIXTURE = MoE(
    experts=128,
    select=SwitchTop1(),
    limit=Capacity(factor=1.0, eval_factor=1.0, priority=RandomPriority()),
)


def moe_128() -> Preset:
    """350M+MoE-128: the same number of experts in every second layer (published as 13B)."""
    return _preset(MIXTURE, published=13e9)


def pyramid_residual() -> Preset:
    """350M+PR-MoE-32/64: a pyramid of residual mixtures (published as 4B)."""
    residual = MIXTURE.replace(experts=32, shared_experts=ResidualExpert())
    return _preset(residual, pyramid=(32,) * 10 + (64,) * 2, published=4e9)


def _preset(moe: MoE, *, published: float, pyramid: tuple[int, ...] = ()) -> Preset:
    config = ModelConfig(
        vocab_size=50_304,
        dim=1024,
        encoder=Stack(layers=0),
        decoder=Stack(layers=24, moe_every=2, experts_per_layer=pyramid),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=4096, activation=GELU()),
        moe=moe,
        norm=LayerNorm(bias=True),
        position=LearnedPositions(max_length=2048),
        embedding=EmbeddingConfig(scaled=False),
        bias=True,
    )
    return Preset(config, SOURCE, (Published("total", published, "paper", SOURCE),), GUESSED)


FAMILY = {"deepspeed-moe-128": moe_128, "pr-moe-350m": pyramid_residual}
