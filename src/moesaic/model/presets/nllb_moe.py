"""NLLB-MoE: the shape of Meta's 200-language mixture (2207.04672).

54.5B parameters are in the abstract of the pruning paper (2212.09811); 128 experts in every fourth
layer are in the released training scripts (``run_flores200_4.4``, fairseq's nllb branch); 24 + 24
layers, width 2048, feed-forward 8192 and 16 heads are those of the 3.3B dense sibling in public
scripts; 256,206 is the vocabulary of the released model. With them the count agrees with 54.5B. We
do not load its weights: details that change no shape (capacity, dropout) are guesses.
"""

from moesaic.model.config import ModelConfig, Stack
from moesaic.model.presets.preset import Preset, Published
from moesaic.moe.config import MoE
from moesaic.moe.limit import Capacity, WeightPriority
from moesaic.moe.select import Top2
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig, ReLU
from moesaic.nn.norm import LayerNorm
from moesaic.nn.positional_encoding import Sinusoidal


def nllb_moe_54b() -> Preset:
    """NLLB-MoE-54B shaped: 24 + 24 layers, 128 experts in every fourth, two per token."""
    config = ModelConfig(
        vocab_size=256_206,
        dim=2048,
        encoder=Stack(layers=24, moe_every=4),
        decoder=Stack(layers=24, moe_every=4),
        attention=AttentionConfig(heads=16),
        feed_forward=FeedForwardConfig(hidden=8192, activation=ReLU()),
        moe=MoE(
            experts=128,
            select=Top2(),
            limit=Capacity(factor=1.0, priority=WeightPriority()),
        ),
        norm=LayerNorm(bias=True),
        position=Sinusoidal(),
        bias=True,
        dropout=0.1,
    )
    published = (Published("total", 54.5e9, "paper", "Koishekenov et al. 2022, arXiv:2212.09811"),)
    guessed = ("moe.limit", "moe.balance", "dropout", "init")
    return Preset(config, "NLLB team 2022, arXiv:2207.04672", published, guessed)


FAMILY = {"nllb-moe-54b": nllb_moe_54b}
