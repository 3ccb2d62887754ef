"""Adapter choices: what is trained beside frozen matrices, whichever kind of adapter it is."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import nn

from moesaic.core.shapes import Float, Tensor
from moesaic.model.transformer import Transformer
from moesaic.model.weights import weight_distributions
from moesaic.moe.experts import GroupedExperts
from moesaic.nn.adapter import is_of_adapter
from moesaic.parallel.trainable_parameters import (
    Patterns,
    TrainableParameters,
    matches,
    unmatched_patterns,
)

BANK_MATRICES = ("up", "down")


class AdapterChoice(TrainableParameters):
    """Base of the choices that train adapters."""

    keeps_base: ClassVar[bool] = True

    def includes(self, name: str) -> bool:
        return is_of_adapter(name)

    @abstractmethod
    def merged(
        self, weight: Float[Tensor, "*E M N"], *, name: str, adapter: Mapping[str, Tensor]
    ) -> Float[Tensor, "*E M N"]:
        """Return a matrix with its adapter added, in float32; the matrix itself if it has none.

        ``name`` is that of the matrix, ``adapter`` has the tensors of all adapters by name.
        """


class MatrixAdapter(AdapterChoice):
    """Base of the choices that train adapters of matrices, of linear maps and of experts.

    ``targets`` are patterns of the names of matrices, or words for parts of the model, as in
    ``MatchingParameters``.
    """

    targets: Patterns = ("experts", "attention")

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
                self.adapt_experts(module, matrices, path=path)
            elif isinstance(module, nn.Linear):
                self.adapt_linear(module, path=path)
        declare_adapters(model)

    @abstractmethod
    def adapt_experts(self, experts: GroupedExperts, matrices: list[str], *, path: str) -> None:
        """Add an adapter of ``matrices`` (``up``, ``down``) to the experts at ``path``."""

    @abstractmethod
    def adapt_linear(self, linear: nn.Linear, *, path: str) -> None:
        """Add an adapter to a linear map."""


def declare_adapters(model: Transformer) -> None:
    """Have a model draw the adapters that were added to it, too."""
    model.distributions = weight_distributions(model, model.config)


def adaptable_matrices(model: Transformer) -> list[str]:
    """Return the names of the matrices that can have an adapter: no routers, no embeddings."""
    kinds, names = model.parameter_kinds(), []
    for path, module in model.named_modules():
        if isinstance(module, GroupedExperts):
            names += [f"{path}.{matrix}" for matrix in BANK_MATRICES]
        elif isinstance(module, nn.Linear) and kinds.get(f"{path}.weight") == "matrix":
            names.append(f"{path}.weight")
    return names
