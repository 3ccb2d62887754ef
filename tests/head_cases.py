"""A model and batches for each head, for the laws that run over all of them."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from moesaic.data.batch import IGNORE_LABEL, Batch, InputRows
from moesaic.model.config import ModelConfig, Stack
from moesaic.model.decoder_mask import FullMask
from moesaic.model.head import Head, LanguageModelHead
from moesaic.model.inputs import ModelInput, Patches, PointValues, TokenIds, Vectors
from moesaic.model.pooled_heads import Classification, Contrastive, MeanOfTokens, Reward
from moesaic.model.value_heads import PatchDenoising, Regression
from moesaic.moe.config import MoE
from moesaic.moe.expert_selection import TopK
from moesaic.nn.attention_config import AttentionConfig
from moesaic.nn.feed_forward import FeedForwardConfig

VOCABULARY = 20
LABELS = {"class": ("a", "b", "c")}
UNREAD = 1e9  # padding is never read


def _model(head: Head, source: ModelInput) -> ModelConfig:
    causal = not isinstance(head, PatchDenoising)
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=16,
        input=source,
        head=head,
        encoder=Stack(layers=0),
        decoder=Stack(layers=2, moe_every=2),
        attention=AttentionConfig(heads=2),
        feed_forward=FeedForwardConfig(hidden=24),
        moe=MoE(experts=3, select=TopK(k=2), balance=()),
        **({} if causal else {"decoder_mask": FullMask()}),
    )


HEADS = {
    "language-model": _model(LanguageModelHead(), TokenIds()),
    "regression": _model(Regression(horizons=(1, 3, 4)), PointValues()),
    "classification": _model(Classification(classes=3), TokenIds()),
    "classification-mean": _model(
        Classification(classes=3, pooling=MeanOfTokens()), Vectors(channels=2)
    ),
    "contrastive": _model(Contrastive(dim=6, temperature=0.5), TokenIds()),
    "reward": _model(Reward(), TokenIds()),
    "denoising": _model(PatchDenoising(channels=2, classes=3), Patches(channels=2, classes=3)),
}
PAIRED = ("contrastive", "reward")


def head_batch(name: str, *, rows: int = 8, seed: int = 0, width: int = 7) -> Batch:
    """Return rows of different lengths, made for the head: what the model is trained on."""
    torch.manual_seed(seed)
    config = HEADS[name]
    lengths = torch.randint(2, width + 1, (rows,))
    target = InputRows(_values(config.input, rows, width), lengths)
    kind = torch.randint(3, (rows,))
    batch = Batch(
        InputRows.empty(rows),
        target,
        _labels(config.head, target, kind),
        {"class": kind},
        torch.randint(2**62, (rows,)),
    )
    return widened(config.head.training_batch(batch), 0)


def widened(batch: Batch, columns: int) -> Batch:
    """Return the same rows with more padding, which may be any number."""
    values, real = batch.target.values, batch.target.real
    if values.is_floating_point():
        values = values.where(real[..., None], UNREAD)
        values = F.pad(values, (0, 0, 0, columns), value=UNREAD)
    else:
        values = F.pad(values.where(real, int(UNREAD)), (0, columns), value=int(UNREAD))
    labels = batch.labels
    if labels.dim() > 1:
        none = torch.nan if labels.is_floating_point() else IGNORE_LABEL
        sides = (0, 0, 0, columns) if labels.dim() == 3 else (0, columns)
        labels = F.pad(labels, sides, value=none)
    return replace(batch, target=InputRows(values, batch.target.lengths), labels=labels)


def _values(source: ModelInput, rows: int, width: int) -> torch.Tensor:
    channels = {PointValues: 1, Vectors: 2, Patches: 2}.get(type(source))
    if channels is None:
        return torch.randint(VOCABULARY, (rows, width))
    return torch.randn(rows, width, channels)


def _labels(head: Head, target: InputRows, kind: torch.Tensor) -> torch.Tensor:
    rows, width = target.rows, target.width
    match head:
        case LanguageModelHead():
            return torch.randint(VOCABULARY, (rows, width)).where(target.real, IGNORE_LABEL)
        case Regression():
            return torch.randn(rows, width).where(target.real, torch.nan)
        case Classification():
            return torch.where(torch.arange(rows) == 1, IGNORE_LABEL, kind)
    return torch.where(torch.arange(rows) % 2 == 0, 0, IGNORE_LABEL)
