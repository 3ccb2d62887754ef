"""Initializers: initial values of parameters, each a function of its place in the whole model.

A model is made with parameters on the meta device (``parameters_on_meta``), cut to the shards of a
rank, given memory (``allocate_parameters``) and filled (``draw_block``). A value is a function of a
seed, the parameter's name and the value's index in the whole parameter (counter-based, as in Salmon
et al., SC 2011, doi:10.1145/2063384.2063405), so every parallel plan starts with the same weights,
bit for bit. A module that is made alone draws its parameters (``normal_parameter``) from torch's
global generator, with the default standard deviations of this file.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moesaic.core.errors import ConfigError
from moesaic.core.shapes import Float, Int, Shaped, Tensor
from moesaic.distributed.world import local_tensor, with_local_tensor
from moesaic.ops.counter_rng import hash_combine, hash_name, hash_to_normal, hash_to_uniform

VALUES_AT_ONCE = 1 << 16  # drawn in one piece: the temporary tensors stay in a core's cache

# name, shape and dtype of a rank's part of a parameter -> its memory, of any content
Allocate = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class _EmptyOnMeta(TorchFunctionMode):
    """Makes ``torch.empty`` return tensors on the meta device; other tensors keep their values."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        return func(*args, **(named | {"device": "meta"} if func is torch.empty else named))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Make modules whose parameters take no memory, but whose buffers have their values.

    Parameters are made of ``torch.empty``, buffers of other functions, in torch's modules as here.
    """
    with _EmptyOnMeta():
        yield


def drop_values(model: nn.Module) -> None:
    """Move to the meta device the parameters that were made with values (gains of 1)."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not old.is_meta and old not in made:
                empty = torch.empty(old.shape, dtype=old.dtype, device="meta")
                made[old] = nn.Parameter(empty, old.requires_grad)
            module.register_parameter(name, made.get(old, old))


def allocate_parameters(model: nn.Module, *, allocate: Allocate, device: torch.device) -> None:
    """Replace every parameter by one in memory of ``allocate``, and move buffers to ``device``.

    Of a DTensor the local part is allocated; a tied parameter is allocated once, under its first
    name. Parameters that were on the meta device have no values yet. Raises ConfigError for a
    buffer that has none.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in made:
                made[old] = _allocated(old, f"{path}.{name}" if path else name, allocate)
            module.register_parameter(name, made[old])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                where = f"buffer {path}.{name} of {type(module).__name__}"
                way_out = (
                    "make it with torch.zeros, torch.full or another function than torch.empty"
                )
                raise ConfigError([f"model: {where} has no values: {way_out}"])
            setattr(module, name, buffer.to(device))


def _allocated(old: nn.Parameter, name: str, allocate: Allocate) -> nn.Parameter:
    local = local_tensor(old.detach())
    memory = allocate(name, tuple(local.shape), local.dtype)
    if not local.is_meta:
        memory.copy_(local)
    return nn.Parameter(with_local_tensor(old, memory), old.requires_grad)


def allocate_whole(model: nn.Module) -> None:
    """Give memory on torch's default device to a whole model; nothing if that is meta."""
    device = torch.get_default_device()
    if device.type != "meta":
        allocate_parameters(model, allocate=allocate_on(device), device=device)


def allocate_on(device: torch.device) -> Allocate:
    """Return the allocation of every parameter on one device."""
    return lambda _name, shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def draw_seed() -> int:
    """Return the seed of a model's initial values, drawn from torch's global generator."""
    return int(torch.randint(2**62, (), device="cpu"))


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """Return a float32 parameter drawn from a normal distribution; zeros for ``std`` 0.

    Draws from torch's global generator. On the meta device nothing is allocated or drawn.
    """
    parameter = nn.Parameter(torch.empty(shape))
    if not parameter.is_meta:  # torch's own way to draw nothing there imports for a second
        with torch.no_grad():
            parameter.normal_(std=std) if std else parameter.zero_()
    return parameter


def router_std(fan_in: int) -> float:
    """Return the default of a map to router logits: Switch (2101.03961, section 2.4)."""
    return (0.1 / fan_in) ** 0.5


def fan_in_std(fan_in: float) -> float:
    """Return the default of matrices, expert weights and (with the model dim) embeddings."""
    return fan_in**-0.5


@dataclass(frozen=True, slots=True)
class ConstantWeights:
    """Every value of a parameter is ``value``."""

    value: float

    def draw(self, bits: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return a value for each hash."""
        return torch.full(bits.shape, self.value, device=bits.device)


@dataclass(frozen=True, slots=True)
class NormalWeights:
    """A normal distribution around zero; a standard deviation of 0 gives zeros."""

    std: float

    def draw(self, bits: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return a value for each hash."""
        return hash_to_normal(bits).mul_(self.std)


@dataclass(frozen=True, slots=True)
class TransformedUniform:
    """The distribution of ``quantile(u)`` for ``u`` uniform in [0, 1), element by element."""

    quantile: Callable[[Float[Tensor, "*N"]], Float[Tensor, "*N"]]

    def draw(self, bits: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Return a value for each hash."""
        return self.quantile(hash_to_uniform(bits))


Distribution = ConstantWeights | NormalWeights | TransformedUniform


@torch.no_grad()
def draw_block(
    block: Shaped[Tensor, "*n"],
    distribution: Distribution,
    *,
    key: int,
    offset: Sequence[int],
    shape: Sequence[int],
) -> None:
    """Fill a block, at ``offset`` of a whole parameter of ``shape``, in place, rounded to float32.

    ``key`` is that of the parameter (``parameter_key``). Takes the memory of some
    ``VALUES_AT_ONCE`` values beside the block.
    """
    if isinstance(distribution, ConstantWeights):
        block.fill_(distribution.value)
        return
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    for piece, index in _pieces(block, first=tuple(offset), strides=strides, base=0):
        piece.copy_(distribution.draw(hash_combine(index, key)).float())


def parameter_key(seed: int, name: str) -> int:
    """Return the key of a parameter's values."""
    return int(hash_combine(torch.tensor(seed), hash_name(name)))


def _pieces(
    block: Tensor, *, first: tuple[int, ...], strides: tuple[int, ...], base: int
) -> Iterator[tuple[Tensor, Int[Tensor, "*m"]]]:
    """Yield views of a block, each with the indices of its values in the whole parameter."""
    if not block.numel():
        return
    per_row = block.numel() // block.shape[0] if block.dim() else 1
    if block.dim() > 1 and per_row > VALUES_AT_ONCE:
        for row, part in enumerate(block.unbind(0)):
            start = base + (first[0] + row) * strides[0]
            yield from _pieces(part, first=first[1:], strides=strides[1:], base=start)
        return
    rows = block.split(max(1, VALUES_AT_ONCE // per_row)) if block.dim() else (block,)
    done = 0
    for part in rows:
        index = torch.full((), base, device=block.device)
        for dim, (size, stride) in enumerate(zip(part.shape, strides, strict=True)):
            start = first[dim] + (done if dim == 0 else 0)
            along = torch.arange(start, start + size, device=block.device) * stride
            index = index[..., None] + along
        yield part, index
        done += part.shape[0] if part.dim() else 1


@dataclass(frozen=True, slots=True)
class Initializer:
    """One parameter's ``kind``, and its initial standard deviation (0: zeros).

    ``fan_in`` is the number of values that one output sums, where it does not follow from the
    shape. None leaves the choice to ``InitConfig``. ``quantile`` gives another distribution: it
    maps uniform numbers in [0, 1) to values, element by element.
    """

    kind: str | None = None
    std: float | None = None
    fan_in: float | None = None
    quantile: Callable[[Float[Tensor, "*N"]], Float[Tensor, "*N"]] | None = None


class CustomInitializers(nn.Module):
    """Base of modules that initialize some of their parameters in their own way."""

    def initializers(self) -> Mapping[str, Initializer]:
        """Return the initializers of those parameters, by their names in this module."""
        raise NotImplementedError


def custom_initializers(model: nn.Module) -> dict[str, Initializer]:
    """Return the custom initializers of a model, by parameter name in the model."""
    return {
        f"{path}.{name}" if path else name: start
        for path, module in model.named_modules()
        if isinstance(module, CustomInitializers)
        for name, start in module.initializers().items()
    }
