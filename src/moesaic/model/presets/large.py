"""Models of the classes that are said to need hundreds or thousands of ranks.

``zcode-200b``: a Z-code M3 of the 200B class. Only what ``zcode_m3.py`` says of the family is
published (24 encoder and 12 decoder layers, experts in every second feed-forward, top-1 gate,
capacity factors, up to 128 experts; 2109.10465); every width is ours, chosen so that 128 experts
make 200B.

``trillion-384``: a decoder of a trillion parameters with the numbers of the released config of Kimi
K2 as secondary texts quote them (61 layers, the first dense and 18432 wide, width 7168, 64 heads,
384 experts 2048 wide of which 8 are chosen, 1 shared, vocabulary 163,840). Ours are plain attention
instead of a latent one, softmax scores instead of sigmoid ones and the balance term.
"""

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets import zcode_m3
from moesaic.model.presets.preset import Preset, Published
from moesaic.moe.balance import SwitchBalance
from moesaic.moe.config import MoE
from moesaic.moe.select import TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig

KIMI_K2 = "the released config of Kimi K2 (moonshotai.github.io/Kimi-K2), as quoted elsewhere"


def zcode_200b() -> Preset:
    """Z-code M3 with 128 experts, as wide as 200B parameters make it."""
    base = zcode_m3.experts_128()
    config = base.config.replace(
        dim=3072,
        attention=AttentionConfig(heads=24),
        feed_forward=base.config.feed_forward.replace(hidden=14_336),
    )
    return Preset(config, zcode_m3.SOURCE, guessed=zcode_m3.GUESSED)


def trillion() -> Preset:
    """61 layers of 384 experts, 8 per token and one for all."""
    config = ModelConfig(
        vocab_size=163_840,
        dim=7168,
        encoder=Stack(layers=0),
        decoder=Stack(layers=61, moe_every=1, first_dense_layers=1),
        attention=AttentionConfig(heads=64),
        feed_forward=FeedForwardConfig(hidden=18_432),
        moe=MoE(
            experts=384,
            hidden=2048,
            select=TopK(k=8),
            balance=(SwitchBalance(weight=0.001),),
            shared_experts=SharedExperts(number=1),
        ),
        embedding=EmbeddingConfig(tied=False, scaled=False),
    )
    published = (Published("total", 1e12, "secondary", KIMI_K2),)
    return Preset(config, KIMI_K2, published, ("attention", "moe.select", "moe.balance", "init"))


FAMILY = {"zcode-200b": zcode_200b, "trillion-384": trillion}
