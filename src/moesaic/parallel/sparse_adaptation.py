"""Sparse fine-tuning: SpIEL (2401.16405), its control of random places, and chosen experts."""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from moesaic.checkpoint.run_directory import RunDir
from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Float, Tensor
from moesaic.distributed.parallel_plan import ParallelPlan
from moesaic.memory.memory_plan import MemoryPlan
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import GroupedExperts
from moesaic.moe.layer import moe_layers
from moesaic.moe.sparse_experts import ChosenExperts, SparseExperts
from moesaic.monitor.expert_usage import LayerUsage, read_usage
from moesaic.nn.adapter import adapter_name, add_adapter
from moesaic.nn.sparse_adapter import SparseLinear, scatter_values
from moesaic.parallel.adapter_choice import (
    BANK_MATRICES,
    AdapterChoice,
    MatrixAdapter,
    declare_adapters,
)


class PlacedAdapter(AdapterChoice):
    """Base of adapters whose places in a matrix are numbers, which ranks cannot share.

    ``refused_axes`` are those of a plan that would shard them.
    """

    refused_axes: ClassVar[tuple[str, ...]] = ("tensor", "expert", "expert_tensor")

    def parallel_problems(self, plan: ParallelPlan, *, memory: MemoryPlan) -> Iterator[str]:
        del memory
        sizes = plan.to_dict()
        for axis in self.refused_axes:
            none = int(axis != "zero")  # ZeRO 1 shards, too
            if (size := sizes.get(axis)) not in (None, none):
                yield (
                    f"trainable={type(self).__name__} under parallel.plan.{axis}={size}: its "
                    f"places in a matrix are not shared between ranks: set {axis} to {none}, or "
                    "train LoRA"
                )


class RandomSparse(PlacedAdapter, MatrixAdapter):
    """Trains a share ``density`` of the values of each matrix of ``targets``, at random places.

    The control of ``SpIEL``: as many parameters, states and saved values. Of experts, a rank trains
    the values of its own; the places of all are on every rank.
    """

    refused_axes: ClassVar[tuple[str, ...]] = ("tensor", "expert_tensor")

    density: float = Field(default=0.01, gt=0, le=1)

    def adapt_experts(self, experts: GroupedExperts, matrices: list[str], *, path: str) -> None:
        experts.adapter = SparseExperts(experts, matrices=matrices, density=self.density, path=path)

    def adapt_linear(self, linear: nn.Linear, *, path: str) -> None:
        add_adapter(linear, SparseLinear(linear, density=self.density, path=path))

    def merged(
        self, weight: Float[Tensor, "*E M N"], *, name: str, adapter: Mapping[str, Tensor]
    ) -> Float[Tensor, "*E M N"]:
        if (values := adapter.get(adapter_name(name, "delta"))) is None:
            return weight
        index = adapter[adapter_name(name, "index")]
        return weight.float() + scatter_values(values.float(), index=index, like=weight)


class SpIEL(RandomSparse):
    """Sparse fine-tuning whose places move to the largest gradients (2401.16405, section 3).

    As ``RandomSparse``, and every ``every`` steps: at the first step the places of the largest
    gradients become candidates, as many as there are values; ``select_steps`` steps sum their
    gradients (accumulated gradients, SpIEL-AG); then the share ``drop * (1 - step / steps)`` of the
    values, those with the smallest differences, is reset to the weight, and as many of the best
    candidates take their places. The first time all do. The moments of AdamW start so that their
    corrected values are the means of the summed gradients and of their squares.
    """

    refused_axes: ClassVar[tuple[str, ...]] = (
        *PlacedAdapter.refused_axes,
        "pipe",
        "context",
        "zero",
    )
    every: int = Field(default=100, ge=2)
    select_steps: int = Field(default=5, ge=1)
    drop: float = Field(default=0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.select_steps > self.every:  # no window would ever end
            raise ValueError(f"select_steps={self.select_steps} to be at most every={self.every}")
        return self

    def parallel_problems(self, plan: ParallelPlan, *, memory: MemoryPlan) -> Iterator[str]:
        yield from super().parallel_problems(plan, memory=memory)
        if not memory.optimizer_states.is_device:
            yield (
                "trainable=SpIEL with parallel.memory.optimizer_states on a tier: its states move "
                "with its places: keep them on the device"
            )


class ExpertsOfLanguage(PlacedAdapter):
    """Trains the experts of one language, all their values, and nothing else.

    In each layer these are the fewest experts that got the share ``share`` of the language's edges
    in the run that training starts from (its ``usage.json``). ``experts`` are their numbers by
    layer; they are looked up where there are none.
    """

    language: str
    share: float = Field(default=0.5, gt=0, le=1)
    experts: dict[str, tuple[int, ...]] = Field(default={})

    def resolved(self, start: RunDir | None) -> Self:
        if self.experts or start is None:
            return self
        key = f"trainable.language={self.language}"
        if not start.usage.is_file():
            text = f"{key}: {start.path} has no usage.json, which counts the experts of a language"
            raise ConfigError([f"{text}: name them (trainable.experts), or train all experts"])
        usage = read_usage(start.usage)
        if self.language not in usage.languages:
            raise ConfigError([f"{key}: {start.usage} counts {', '.join(usage.languages)}"])
        column, share = usage.languages.index(self.language), self.share
        chosen = {each.layer: experts_of(each, column, share=share) for each in usage.layers}
        return self.replace(experts={name: own for name, own in chosen.items() if own})

    def problems(self, model: Transformer) -> Iterator[str]:
        numbers = {
            layer.name: layer.router.config.experts
            for layer in moe_layers(model)
            if isinstance(layer.experts, GroupedExperts)
        }
        for name, chosen in self.experts.items():
            allowed = range(numbers.get(name, 0))
            if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(allowed):
                known = ", ".join(f"{layer} (0 to {n - 1})" for layer, n in numbers.items())
                yield (
                    f"trainable.experts.{name}={list(chosen)}: expected different numbers of "
                    f"experts of a layer: {known}"
                )

    def attach(self, model: Transformer) -> None:
        for layer in moe_layers(model):
            if isinstance(layer.experts, GroupedExperts) and layer.name in self.experts:
                layer.experts.adapter = ChosenExperts(
                    layer.experts, matrices=BANK_MATRICES, chosen=self.experts[layer.name]
                )
        declare_adapters(model)

    def merged(
        self, weight: Float[Tensor, "*E M N"], *, name: str, adapter: Mapping[str, Tensor]
    ) -> Float[Tensor, "*E M N"]:
        if (delta := adapter.get(adapter_name(name, "delta"))) is None:
            return weight
        chosen = adapter[f"{adapter_name(name, '').rpartition('.')[0]}.chosen"]
        return weight.float().index_add(0, chosen, delta.float())


def experts_of(usage: LayerUsage, column: int, *, share: float) -> tuple[int, ...]:
    """Return the fewest experts of a layer that got ``share`` of a language's edges, sorted.

    ``column`` is the language's in the counts. Experts with equal counts are taken by number.
    """
    counts = usage.counts[: len(usage.computing_load), column].tolist()
    wanted, chosen = share * sum(counts), []
    for expert in sorted(range(len(counts)), key=lambda e: (-counts[e], e)):
        if wanted <= 0:
            break
        chosen.append(expert)
        wanted -= counts[expert]
    return tuple(sorted(chosen))
