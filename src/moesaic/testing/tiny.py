"""Tiny models and batches: small enough for a law to train them in milliseconds."""

from dataclasses import fields

import torch

from moesaic.core.shapes import Tensor
from moesaic.data.batch import PAD, Batch
from moesaic.model.config import Stack, TransformerConfig
from moesaic.moe.balance import RouterZ, SwitchBalance
from moesaic.moe.config import MoE, Sparse
from moesaic.moe.select import SwitchTop1
from moesaic.nn.attention import AttentionConfig
from moesaic.nn.feed_forward import FeedForward

VOCABULARY = 64
TASKS = ("translation", "denoising")
LANGUAGES = ("deu_Latn", "ell_Grek", "fra_Latn")
BALANCED_TOP1 = MoE(experts=4, select=SwitchTop1(), balance=(SwitchBalance(), RouterZ()))


def tiny_model_config(*, moe: Sparse = BALANCED_TOP1, layers: int = 1) -> TransformerConfig:
    """Return an encoder-decoder of ``layers`` layers each, experts in every one."""
    stack = Stack(layers=layers, moe_every=1)
    return TransformerConfig(
        vocab_size=VOCABULARY,
        dim=16,
        encoder=stack,
        decoder=stack,
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForward(hidden=32),
        moe=moe,
    )


def random_batch(rows: int, *, seed: int, length: int = 9) -> Batch:
    """Return rows of random lengths (at least 2), tasks and languages."""
    draw = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        tokens = torch.randint(5, VOCABULARY, (rows, length), generator=draw)
        lengths = torch.randint(2, length + 1, (rows, 1), generator=draw)
        return torch.where(torch.arange(length) < lengths, tokens, PAD)

    target = ids()
    return Batch(
        source=ids(),
        target_in=target,
        target_out=target.roll(-1, dims=1).where(target != PAD, PAD),
        task=torch.randint(len(TASKS), (rows,), generator=draw),
        source_language=torch.randint(len(LANGUAGES), (rows,), generator=draw),
        target_language=torch.randint(len(LANGUAGES), (rows,), generator=draw),
    )


def rows_of(batch: Batch, *, rank: int, world: int) -> Batch:
    """Return every ``world``-th row, from ``rank`` on."""
    return Batch(**{field.name: getattr(batch, field.name)[rank::world] for field in fields(Batch)})
