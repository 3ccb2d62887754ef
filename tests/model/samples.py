"""Models and batches for the tests of the model: every part appears in some variant."""

import torch

from moesaic.data.batch import PAD, Batch
from moesaic.model.config import Stack, TransformerConfig
from moesaic.moe.balance import RouterZ, SwitchBalance
from moesaic.moe.config import MoE, NoMoE
from moesaic.moe.select import SwitchTop1, Top2, TopK
from moesaic.nn.activation import ReLU, SquaredReLU, SwiGLU
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.embedding import EmbeddingConfig
from moesaic.nn.feed_forward import FeedForward
from moesaic.nn.norm import LayerNorm
from moesaic.nn.position import Learned, NoPosition, Sinusoidal

VOCABULARY = 40
BASE = TransformerConfig(
    vocab_size=VOCABULARY,
    dim=16,
    encoder=Stack(layers=2),
    decoder=Stack(layers=2, moe_every=1),
    attention=AttentionConfig(heads=4, kv_heads=2),
    feed_forward=FeedForward(hidden=24, activation=SwiGLU()),
    moe=MoE(experts=4, select=TopK(k=2), balance=(SwitchBalance(), RouterZ())),
)
NONE = Stack(layers=0)
VARIANTS = {
    "rotary-top2": BASE,
    "dense": BASE.replace(moe=NoMoE()),
    "switch-layernorm-sinusoidal-bias": BASE.replace(
        moe=MoE(experts=3, select=SwitchTop1(), hidden=8),
        norm=LayerNorm(bias=True),
        position=Sinusoidal(),
        bias=True,
        feed_forward=FeedForward(hidden=24, activation=ReLU()),
    ),
    "gshard-learned-untied": BASE.replace(
        moe=MoE(experts=4, select=Top2()),
        position=Learned(max=32),
        embedding=EmbeddingConfig(tied=False, scaled=False),
        attention=AttentionConfig(heads=2, head_dim=6),
    ),
    "decoder-only": BASE.replace(encoder=NONE),
    "decoder-only-dense-nope": BASE.replace(
        encoder=NONE,
        moe=NoMoE(),
        position=NoPosition(),
        feed_forward=FeedForward(hidden=24, activation=SquaredReLU()),
    ),
}


def ids(rows: int, lengths: list[int], *, width: int) -> torch.Tensor:
    """Random tokens, right-padded."""
    tokens = torch.randint(5, VOCABULARY, (rows, width))
    return torch.where(torch.arange(width) < torch.tensor(lengths)[:, None], tokens, PAD)


def batch_for(config: TransformerConfig, *, padding: int = 0) -> Batch:
    """Four rows of different lengths; ``padding`` adds empty columns on both sides."""
    lengths = [5, 1, 3, 6]
    target = ids(4, lengths, width=6)
    says = torch.where(target != PAD, torch.randint(5, VOCABULARY, target.shape), PAD)
    source = ids(4, [2, 7, 4, 4], width=7)
    if not config.encoder.layers:
        source = source[:, :0]
        says[:, 0] = PAD  # a prompt is not predicted
    zero = torch.zeros(4, dtype=torch.long)
    batch = Batch(source, target, says, zero, zero, zero, zero)
    return padded(batch, padding) if padding else batch


def padded(batch: Batch, columns: int) -> Batch:
    """The same rows with more padding on the right."""
    wider = [
        torch.nn.functional.pad(t, (0, columns), value=PAD)
        for t in (batch.source, batch.target_in, batch.target_out)
    ]
    return Batch(*wider, batch.task, batch.source_language, batch.target_language, batch.key)
