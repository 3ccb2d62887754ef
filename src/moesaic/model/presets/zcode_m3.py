"""Z-code M3: the multitask multilingual encoder-decoder of the DeepSpeed MoE paper (2109.10465).

What the sources give (read in secondary texts, not in the paper's tables): 24 encoder and 12
decoder layers, experts in every second feed-forward, top-1 gate, capacity factor 1.0 in training
and 2.0 in evaluation, Random Token Selection, a dense base of 0.7B parameters, "10B" for 64
experts, up to 128.

What nobody published and we guess: width 1024, feed-forward 4096, 16 heads, ReLU, pre-norm with
biases, sinusoidal positions, a tied vocabulary of 128,000 and the balance weight 0.01. The guess
agrees with "10B" and counts less than 0.7B for the dense base (a vocabulary near 190,000 would
close that gap), so it fits; it does not confirm.
"""

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets.preset import Preset, Published
from moesaic.moe.balance import SwitchBalance
from moesaic.moe.config import MoE, NoMoE, SparseLayer
from moesaic.moe.limit import Capacity, RandomPriority
from moesaic.moe.select import SwitchTop1
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm
from moesaic.nn.positional_encoding import Sinusoidal

SOURCE = "Kim et al. 2021, arXiv:2109.10465"
GUESSED = (
    "vocab_size",
    "dim",
    "attention",
    "feed_forward",
    "norm",
    "position",
    "embedding",
    "bias",
    "moe.balance",
)


def dense() -> Preset:
    """The dense base of Z-code M3 (0.7B published)."""
    return _preset(NoMoE(), published=(Published("total", 0.7e9, "secondary", SOURCE),))


def experts_64() -> Preset:
    """Z-code M3 with 64 experts (published as the 10B model)."""
    return _preset(_moe(64), published=(Published("total", 10e9, "secondary", SOURCE),))


def experts_128() -> Preset:
    """Z-code M3 with 128 experts, the largest the paper speaks of (size not published)."""
    return _preset(_moe(128))


def _moe(experts: int) -> MoE:
    return MoE(
        experts=experts,
        select=SwitchTop1(),
        limit=Capacity(factor=1.0, eval_factor=2.0, priority=RandomPriority()),
        balance=(SwitchBalance(weight=0.01),),
    )


def _preset(moe: SparseLayer, *, published: tuple[Published, ...] = ()) -> Preset:
    config = ModelConfig(
        vocab_size=128_000,
        dim=1024,
        encoder=Stack(layers=24, moe_every=2),
        decoder=Stack(layers=12, moe_every=2),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=4096, activation=ReLU()),
        moe=moe,
        norm=LayerNorm(bias=True),
        position=Sinusoidal(),
        bias=True,
        dropout=0.1,
    )
    return Preset(config, SOURCE, published, GUESSED)


FAMILY = {"zcode-m3": dense, "zcode-m3-64": experts_64, "zcode-m3-128": experts_128}
