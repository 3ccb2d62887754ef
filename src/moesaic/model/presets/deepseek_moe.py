"""DeepSeekMoE: fine-grained and shared experts, decoders alone (2401.06066).

16B: every number is in the released config (28 layers, the first dense and 10944 wide, width 2048,
16 heads, 64 routed experts 1408 wide of which 6 are chosen, 2 shared, softmax weights that are not
renormalised, vocabulary 102,400, untied); 16.4B parameters with 2.8B active are quoted in secondary
texts. 2B, the paper's validation model: 9 layers, width 1280, 10 heads, sixteen experts split in
four of which one is shared and seven are chosen; its feed-forward and vocabulary are guesses with
which the count agrees with "2B".
"""

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets.preset import Preset, Published
from moesaic.moe.balance import SwitchBalance
from moesaic.moe.config import MoE, fine_grained
from moesaic.moe.select import TopK
from moesaic.moe.shared_experts import SharedExperts
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForwardConfig

SOURCE = "Dai et al. 2024, arXiv:2401.06066"
NONE = Stack(layers=0)


def deepseek_moe_16b() -> Preset:
    """DeepSeekMoE-16B shaped: 27 of 28 layers with 2 shared and 64 routed experts, 6 per token."""
    config = ModelConfig(
        vocab_size=102_400,
        dim=2048,
        encoder=NONE,
        decoder=Stack(layers=28, moe_every=1, first_dense_layers=1),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=10_944),
        moe=MoE(
            experts=64,
            hidden=1408,
            select=TopK(k=6, normalise="none"),
            balance=(SwitchBalance(weight=0.001),),
            shared_experts=SharedExperts(number=2),
        ),
        embedding=EmbeddingConfig(tied=False, scaled=False),
    )
    published = (
        Published("total", 16.4e9, "secondary", SOURCE),
        Published("active", 2.8e9, "secondary", SOURCE),
    )
    return Preset(config, SOURCE, published, ("init",))


def deepseek_moe_2b() -> Preset:
    """The validation model: 16 experts, two of them active, split in four; one part is shared."""
    hidden = 3412
    coarse = MoE(experts=16, select=TopK(k=2), balance=(SwitchBalance(weight=0.01),))
    config = ModelConfig(
        vocab_size=8_000,
        dim=1280,
        encoder=NONE,
        decoder=Stack(layers=9, moe_every=1),
        attention=AttentionConfig(heads=10),
        feed_forward=FeedForwardConfig(hidden=hidden),
        moe=fine_grained(coarse, hidden=hidden, splits=4, shared=1),
        embedding=EmbeddingConfig(tied=False, scaled=False),
    )
    guessed = ("vocab_size", "feed_forward", "embedding", "init")
    return Preset(config, SOURCE, (Published("total", 2e9, "paper", SOURCE),), guessed)


FAMILY = {"deepseek-moe-16b": deepseek_moe_16b, "deepseek-moe-2b": deepseek_moe_2b}
