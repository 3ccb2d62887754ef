"""Heads that predict numbers: the next points of a series at several horizons, and noise.

Letters: B rows, L length, N predictions, H longest horizon, h a horizon, C channels, D model dim.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn

from moesaic.core.config import Choice
from moesaic.core.shapes import Bool, Float, Int, Tensor
from moesaic.data.batch import Batch, InputRows
from moesaic.model.head import (
    PATCH_LABELS,
    POINT_LABELS,
    Head,
    HeadLoss,
    HeadModule,
    HeadProjection,
    HeadShape,
    LinearHead,
    ModelOutput,
    Predictions,
    projection_specs,
)
from moesaic.model.inputs import ModelInput, Patches, with_condition
from moesaic.nn.noise_schedule import NoiseSchedule, RectifiedFlow
from moesaic.nn.packing import Packing
from moesaic.nn.parameter_spec import ParameterSpec
from moesaic.ops.counter_rng import bits_to_normal, bits_to_uniform, hash_combine, hash_name


class PointLoss(Choice):
    """Family: the loss of a number, by its error."""

    def __call__(self, error: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        raise NotImplementedError


class SquaredError(PointLoss):
    """``error ** 2``."""

    def __call__(self, error: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return error.square()


class Huber(PointLoss):
    """``error ** 2 / 2`` up to ``delta``, linear beyond (Huber 1964, doi:10.1214/aoms/1177703732).

    A spike of a series then has a bounded gradient (Time-MoE, 2409.16040, section 3.2.2).
    """

    delta: float = Field(default=2.0, gt=0)

    def __call__(self, error: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.delta)


class Regression(Head):
    """The next points of a series, at several horizons at once (Time-MoE, 2409.16040, 3.2).

    Each horizon h has a linear map from a position's state to the h points after it. Labels are
    [B, L] float: at each position the point after it, NaN where nothing is predicted; the further
    points of a horizon are the labels of the next positions. The loss of a position is the mean
    over horizons of the mean over their points.
    """

    horizons: tuple[int, ...] = (1, 8, 32, 64)
    loss: PointLoss = Huber()

    loss_name = "regression"
    metric_names = ("mse", "mae")
    label_kind = POINT_LABELS

    @field_validator("horizons")
    @classmethod
    def _check_horizons(cls, horizons: tuple[int, ...]) -> tuple[int, ...]:
        if not horizons or min(horizons) < 1 or sorted(set(horizons)) != list(horizons):
            raise ValueError(f"found {list(horizons)}, expected rising numbers of at least 1")
        return horizons

    def build(self, shape: HeadShape, /) -> "HorizonHeads":
        return HorizonHeads(self, dim=shape.dim)

    def parameter_specs(self, shape: HeadShape, /) -> Sequence[ParameterSpec]:
        return [s for h in self.horizons for s in projection_specs(shape.dim, h, bias=False)]

    def num_predicted(self, batch: Batch) -> int:
        POINT_LABELS.require(batch.labels)
        return int((~batch.labels.isnan() & batch.target.real).sum())

    def select(self, batch: Batch, *, packing: Packing) -> Predictions:
        local = packing.local_tokens
        points = batch.labels.masked_fill(~batch.target.real, torch.nan)
        following = F.pad(points, (0, self.horizons[-1] - 1), value=torch.nan)
        windows = following.unfold(1, self.horizons[-1], 1).flatten(0, 1)  # [B L, H]
        label = windows[packing.index[local]]
        predicted = (~label[:, 0].isnan()).nonzero()[:, 0]
        return Predictions(predicted, label[predicted], packing.row[local][predicted])


class HorizonHeads(HeadModule):
    """A linear map of each horizon; predictions are those of all horizons, one after the other."""

    def __init__(self, config: Regression, *, dim: int) -> None:
        super().__init__()
        self.config = config
        self.horizons = nn.ModuleList(HeadProjection(dim, h, bias=False) for h in config.horizons)

    def forward(
        self, hidden: Float[Tensor, "N D"], *, source: nn.Module
    ) -> Float[Tensor, "N sum_h"]:
        """Return the points of every horizon, the shortest first."""
        del source
        return torch.cat([horizon(hidden) for horizon in self.horizons], 1)

    def loss(self, output: ModelOutput, *, source: nn.Module) -> HeadLoss:
        points = self(output.hidden, source=source)
        widths = self.config.horizons
        wanted = torch.cat([output.label[:, :h] for h in widths], 1)
        real = ~wanted.isnan()
        error = torch.where(real, points - wanted.nan_to_num(), 0.0)
        each = _mean_over_horizons(self.config.loss(error), real=real, widths=widths)
        metrics = {
            "mse": _mean_over_horizons(error.detach().square(), real=real, widths=widths),
            "mae": _mean_over_horizons(error.detach().abs(), real=real, widths=widths),
        }
        return HeadLoss(each.sum(), each.detach(), metrics)


def _mean_over_horizons(
    values: Float[Tensor, "N sum_h"], *, real: Bool[Tensor, "N sum_h"], widths: Sequence[int]
) -> Float[Tensor, "N"]:
    """Return the mean over horizons of the mean over their real points."""
    sums = [part.sum(1) for part in values.split(list(widths), 1)]
    counts = [part.sum(1).clamp(min=1) for part in real.split(list(widths), 1)]
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    return torch.stack(means).mean(0)


class PatchDenoising(Head):
    """What was added to an image's patches: noise or velocity, as ``schedule`` says (DiT).

    The data gives clean patches as its targets [B, S, channels]. Noise, time and (with
    ``classes``) the drop of the class to none, for classifier-free guidance (2207.12598), are
    functions of each row's key; the class of a row is its label in the group ``class``. The loss of
    a patch is the mean squared error of its channels.
    """

    channels: int = Field(ge=1)
    classes: int = Field(default=0, ge=0)
    class_dropout: float = Field(default=0.1, ge=0, lt=1)
    schedule: NoiseSchedule = RectifiedFlow()

    loss_name = "denoising"
    label_kind = PATCH_LABELS

    def build(self, shape: HeadShape, /) -> "NoiseHead":
        return NoiseHead(shape.dim, self.channels, bias=True)

    def problems(self, source: ModelInput, /) -> str | None:
        if isinstance(source, Patches) and (source.channels, source.classes) == (
            self.channels,
            self.classes,
        ):
            return None
        return f"input=Patches(channels={self.channels}, classes={self.classes})"

    def parameter_specs(self, shape: HeadShape, /) -> Sequence[ParameterSpec]:
        return projection_specs(shape.dim, self.channels, bias=True)

    def training_batch(self, batch: Batch) -> Batch:
        clean = batch.target.values
        PATCH_LABELS.require(clean)
        time = _uniform(batch.key, "time")
        noise = _normal(batch.key, shape=tuple(clean.shape[1:]))
        noisy = self.schedule.noisy(clean, noise=noise, time=time)
        values = with_condition(noisy, time=time, kind=self._class_or_none(batch))
        labels = self.schedule.target(clean, noise=noise)
        return replace(batch, target=InputRows(values, batch.target.lengths), labels=labels)

    def _class_or_none(self, batch: Batch) -> Int[Tensor, "B"]:
        if not self.classes:
            return torch.zeros_like(batch.key)
        kept = _uniform(batch.key, "class") >= self.class_dropout
        return torch.where(kept, batch.groups["class"], self.classes)

    def num_predicted(self, batch: Batch) -> int:
        return int(batch.target.lengths.sum())

    def select(self, batch: Batch, *, packing: Packing) -> Predictions:
        local = packing.local_tokens
        label = batch.labels.flatten(0, 1)[packing.index[local]]
        return Predictions(None, label, packing.row[local])


class NoiseHead(LinearHead):
    """A linear map to the channels of a patch: noise or velocity."""

    def loss(self, output: ModelOutput, *, source: nn.Module) -> HeadLoss:
        each = (self(output.hidden, source=source) - output.label).square().mean(1)
        return HeadLoss(each.sum(), each.detach())


def _uniform(key: Int[Tensor, "B"], purpose: str) -> Float[Tensor, "B"]:
    return bits_to_uniform(hash_combine(key, hash_name(purpose)))


def _normal(key: Int[Tensor, "B"], *, shape: tuple[int, ...]) -> Float[Tensor, "B *shape"]:
    """Return standard normal numbers of each row, functions of its key."""
    index = torch.arange(torch.Size(shape).numel(), device=key.device)
    radius, angle = (
        hash_combine(hash_combine(key, hash_name(name))[:, None], index)
        for name in ("noise radius", "noise angle")
    )
    return bits_to_normal(radius, angle).view(-1, *shape)
