"""Results of operations on fake tensors, made from what an earlier call like it returned.

PyTorch's ``FakeTensorMode`` computes the shape, strides and dtype of every result anew, which is
most of the time of a simulation. They depend on the shapes, strides and dtypes of the arguments and
on the numbers among them alone, so one call of each kind is computed and the others repeat it.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

from moesaic.core.shapes import Tensor

_CPU = torch.device("cpu")
_MOST_CALLS = 1 << 16  # kept, of all simulations of this process
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)
_PLAIN += (torch.memory_format,)


class _New(NamedTuple):
    """A result in memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _UnlikeError(Exception):
    """An argument or a result that says more than shapes, strides, dtypes and numbers."""


_known: dict[Any, Any] = {}


def run_on_fake_tensors(
    mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what an operation returns under ``mode``, with at least one fake tensor."""
    try:
        if is_view(func):
            return _view(mode, func, args, kwargs)
        key = (func, _describe(args), *((name, _describe(v)) for name, v in kwargs.items()))
    except _UnlikeError:
        return _compute(mode, func, args, kwargs)
    given = tensors_in((*args, *kwargs.values()))
    if key not in _known:
        out = _compute(mode, func, args, kwargs)
        unchanged = key[1] == _describe(args)
        if len(_known) >= _MOST_CALLS:
            _known.clear()
        _known[key] = _recipe(out, given) if unchanged else _UnlikeError
        return out
    recipe = _known[key]
    if recipe is _UnlikeError:
        return _compute(mode, func, args, kwargs)
    return _make(recipe, given, mode)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments or results of an operation, in order, also of lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


@cache
def is_view(func: Any) -> bool:
    """Whether an operation returns a view of an argument, or nothing of tensors at all."""
    if func.namespace == "prim":
        return True
    results = func._schema.returns
    return bool(results) and all(r.alias_info and not r.alias_info.is_write for r in results)


def _compute(
    mode: FakeTensorMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with mode:
        return func(*args, **kwargs)


def _view(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return views of the first argument, by PyTorch's own operation on what it holds."""
    if func.namespace == "prim" or len(tensors_in((*args, *kwargs.values()))) != 1:
        raise _UnlikeError
    _describe(args[:1])
    with in_kernel_invocation_manager(mode):
        out = func(*args, **kwargs)
    if isinstance(out, list | tuple):
        return type(out)(FakeTensor(mode, each, _CPU) for each in out)
    return FakeTensor(mode, out, _CPU)


def _describe(value: Any) -> Any:
    """Return what a result depends on. Raises ``_UnlikeError`` where that is unknown."""
    if isinstance(value, FakeTensor):
        if value.fake_device != _CPU or value.constant is not None:
            raise _UnlikeError
        return (value.shape, value.stride(), value.storage_offset(), value.dtype)
    if isinstance(value, torch.Tensor):
        if not value.ndim or value.device != _CPU:  # a number takes another part in promotion
            raise _UnlikeError
        return (value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_describe, value))
    if isinstance(value, _PLAIN):
        return (value.__class__, value)
    raise _UnlikeError


def _recipe(out: Any, given: list[Tensor]) -> Any:
    """Return how to make a result: new memory, the number of an argument, or several of these."""
    results = tensors_in((out,))
    memory = [each.untyped_storage()._cdata for each in (*results, *given)]
    try:
        recipe = _recipe_of(out, given, memory[len(results) :])
    except _UnlikeError:
        return _UnlikeError
    new = [m for each, m in zip(results, memory, strict=False) if not _is_in(each, given)]
    return recipe if len(set(new)) == len(new) else _UnlikeError


def _recipe_of(out: Any, given: list[Tensor], memory: list[int]) -> Any:
    if out is None:
        return None
    if isinstance(out, list | tuple):
        return [type(out), *(_recipe_of(each, given, memory) for each in out)]
    if not isinstance(out, torch.Tensor):
        raise _UnlikeError
    if _is_in(out, given):
        return next(i for i, each in enumerate(given) if each is out)
    _describe(out)
    found, storage = _New(out.shape, out.stride(), out.dtype), out.untyped_storage()
    exact = _empty(found).untyped_storage().nbytes() == storage.nbytes()
    if not isinstance(out, FakeTensor) or storage._cdata in memory or not exact:
        raise _UnlikeError
    return found


def _is_in(tensor: Tensor, given: list[Tensor]) -> bool:
    return any(each is tensor for each in given)


def _make(recipe: Any, given: list[Tensor], mode: FakeTensorMode) -> Any:
    if isinstance(recipe, _New):
        return FakeTensor(mode, _empty(recipe), _CPU)
    if isinstance(recipe, list):
        return recipe[0](_make(each, given, mode) for each in recipe[1:])
    return None if recipe is None else given[recipe]


def _empty(new: _New) -> Tensor:
    return torch.empty_strided(new.shape, new.stride, dtype=new.dtype, device="meta")
