"""LoRA as a choice of what a run trains: low-rank adapters beside frozen matrices (2106.09685)."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.model.transformer import Transformer
from moesaic.model.weights import weight_distributions
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.low_rank_experts import LowRankExperts
from moesaic.nn.adapter import LowRankLinear, adapter_name, add_adapter, is_of_adapter
from moesaic.train.trainable_parameters import (
    Patterns,
    TrainableParameters,
    matches,
    unmatched_patterns,
)

BANK_MATRICES = ("up", "down")


class AdapterChoice(TrainableParameters):
    """Base of the choices that train adapters: matrices of linear maps and of experts.

    ``targets`` are patterns of the names of matrices, or words for parts of the model, as in
    ``MatchingParameters``.
    """

    keeps_base: ClassVar[bool] = True
    targets: Patterns = ("experts", "attention")

    def includes(self, name: str) -> bool:
        return is_of_adapter(name)

    def problems(self, model: Transformer) -> Iterator[str]:
        yield from unmatched_patterns(
            self.targets, adaptable_matrices(model), key="trainable.targets"
        )

    def attach(self, model: Transformer) -> None:
        named, targets = dict(model.named_modules()), {}
        for name in adaptable_matrices(model):
            if matches(name, self.targets):
                path, _, matrix = name.rpartition(".")
                targets.setdefault(path, []).append(matrix)
        for path, matrices in targets.items():
            module = named[path]
            if isinstance(module, GroupedExperts):
                self.adapt_experts(module, matrices)
            elif isinstance(module, nn.Linear):
                self.adapt_linear(module)
        model.distributions = weight_distributions(model, model.config)

    def adapt_experts(self, experts: GroupedExperts, matrices: list[str]) -> None:
        """Add an adapter of ``matrices`` (``up``, ``down``) to the experts of a layer."""
        raise NotImplementedError

    def adapt_linear(self, linear: nn.Linear) -> None:
        """Add an adapter to a linear map."""
        raise NotImplementedError

    def merged(
        self, weight: Float[Tensor, "*E M N"], *, name: str, adapter: Mapping[str, Tensor]
    ) -> Float[Tensor, "*E M N"]:
        """Return a matrix with its adapter added, in float32; the matrix itself if it has none.

        ``name`` is that of the matrix, ``adapter`` has the tensors of all adapters by name.
        """
        raise NotImplementedError


class LoRA(AdapterChoice):
    """Trains ``W + alpha / rank * B A`` with W frozen, for each matrix of ``targets``.

    A is [rank, inputs], drawn as other matrices are; B is [outputs, rank], zeros at the start. Of
    experts each has factors of its own. There is no dropout: of the products with expert weights
    none is possible that merging leaves equal (PEFT refuses it, too).
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / self.rank

    def adapt_experts(self, experts: GroupedExperts, matrices: list[str]) -> None:
        experts.adapter = LowRankExperts(
            experts, matrices=matrices, rank=self.rank, scale=self.scale
        )

    def adapt_linear(self, linear: nn.Linear) -> None:
        add_adapter(linear, LowRankLinear(linear, rank=self.rank, scale=self.scale))

    def merged(
        self, weight: Float[Tensor, "*E M N"], *, name: str, adapter: Mapping[str, Tensor]
    ) -> Float[Tensor, "*E M N"]:
        if (first := adapter_name(name, "a")) not in adapter:
            return weight
        a, b = adapter[first].float(), adapter[adapter_name(name, "b")].float()
        product = a @ b if weight.dim() == 3 else b @ a
        return torch.add(weight.float(), product, alpha=self.scale)


def adaptable_matrices(model: Transformer) -> list[str]:
    """Return the names of the matrices that can have an adapter: no routers, no embeddings."""
    kinds, names = model.parameter_kinds(), []
    for path, module in model.named_modules():
        if isinstance(module, GroupedExperts):
            names += [f"{path}.{matrix}" for matrix in BANK_MATRICES]
        elif isinstance(module, nn.Linear) and kinds.get(f"{path}.weight") == "matrix":
            names.append(f"{path}.weight")
    return names
